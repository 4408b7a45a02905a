"""What the page does, without the page: every button is one of these functions."""

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from opsin.catalog import list_cards, show, verdict_of
from opsin.catalog.cards import KINDS
from opsin.deploy.predict import predict
from opsin.deploy.runner import Runner, open_runner
from opsin.errors import BadInput

HEADINGS = ("name", "kind", "year", "claim", "what it is")


def kinds() -> list[str]:
    """The kinds that the catalogue holds, after "all"."""
    there = {card.kind for card in list_cards()}
    return ["all", *(kind for kind in KINDS if kind in there)]


def catalogue(kind: str = "all", search: str = "") -> list[list[str]]:
    """Rows under `HEADINGS`."""
    cards = list_cards(None if kind == "all" else kind, search)
    return [[c.key, c.kind, str(c.year or ""), (verdict_of(c) or {}).get("verdict", ""), c.summary] for c in cards]


def describe(name: str) -> str:
    """One system in Markdown."""
    facts = show(name)
    card, evidence = facts["card"], facts["evidence"]
    parts = [f"### {card.key}", card.summary]
    if card.paper:
        link = f"[arXiv:{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else ""
        parts.append(f"*{card.paper}* ({card.year}) {link}")
    if card.headline:
        parts.append(f"**Published:** {card.headline}")
    parts.append(f"**Claim:** {evidence['claim']} **{evidence['verdict']}**" if evidence else "**Claim:** not measured")
    return "\n\n".join([*parts, f"```python\n{facts['usage'][0].strip()}\n```"])


def find_models(places: Sequence[str | Path]) -> list[str]:
    """Exported files and finished runs in these places, newest first. A place may also be such a file or run itself.

    Raises BadInput where a place does not exist.
    """
    found: dict[Path, float] = {}
    for place in map(Path, places):
        if not place.exists():
            raise BadInput(f"there is no model or folder '{place}'")
        if place.is_file():
            found[place] = place.stat().st_mtime
            continue
        for name in ("*.onnx", "*.pt2", "weights.safetensors"):
            for path in place.rglob(name):
                model = path.parent if path.suffix == ".safetensors" else path
                if model is path or (model / "result.json").is_file():
                    found[model] = path.stat().st_mtime
    return [str(path) for path in sorted(found, key=lambda path: -found[path])]


@lru_cache(maxsize=4)
def _runner(model: str, changed: float) -> Runner:
    return open_runner(model)


def classify(image: str | None, model: str | None, top: int = 5) -> dict[str, float]:
    """Classes of an image file with their probabilities. Raises BadInput."""
    if not image:
        raise BadInput("there is no image yet; choose one")
    if not model:
        raise BadInput("there is no model yet; train one with `opsin fit` or `opsin compare`, or pass --model FILE")
    runner = _runner(model, Path(model).stat().st_mtime)
    return dict(predict(image, runner, top=top).rows[0].top)


def restore_photo(image: str | None, scale: int = 2) -> str:
    """Enlarges a photo; returns the file, in a new temporary folder. Raises BadInput."""
    if not image:
        raise BadInput("there is no photo yet; choose one")
    from opsin.restore.verb import restore

    folder = tempfile.mkdtemp(prefix="opsin-")
    return str(restore(image, task="sr", scale=scale, output=folder, progress=False)[0])

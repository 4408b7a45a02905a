"""A comparison as a folder: its settings, and questions to its tables."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opsin.errors import BadInput
from opsin.train import table
from opsin.train.names import slug
from opsin.train.progress import duration, plural

SETTINGS = "comparison.json"


@dataclass(frozen=True)
class Settings:
    """What a comparison is. All but `models` and `seeds` must stay the same for its trials to be comparable.

    data: the source. samples, classes: what it held. budget: seconds of each trial, or None where `epochs` says it.
    """

    data: str
    data_options: dict[str, Any]
    samples: dict[str, int]
    classes: tuple[str, ...]
    task: str
    recipe: tuple[str, ...]
    budget: float | None
    epochs: int | None
    models: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def fixed(self) -> dict[str, Any]:
        """The part that decides whether trials belong together."""
        table = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in table.items() if name not in ("models", "seeds")}

    @property
    def length(self) -> str:
        """The budget of a trial in words."""
        return plural(self.epochs, "epoch") if self.epochs else duration(self.budget or 0)


@dataclass(frozen=True)
class Comparison:
    """A comparison's folder.

    trials/MODEL-sSEED: the runs. *.parquet: the tables (see `opsin.train.table`). winner.onnx, report.html, pareto.svg.
    """

    folder: Path
    settings: Settings

    @classmethod
    def load(cls, folder: str | Path) -> "Comparison":
        """Opens the folder of a comparison. Raises BadInput where it is none."""
        path = Path(folder) / SETTINGS
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(f"'{folder}' is not the folder of a comparison (no readable {SETTINGS} in it)") from error
        lists = {name: tuple(settings[name]) for name in ("classes", "recipe", "models", "seeds")}
        return cls(Path(folder), Settings(**{**settings, **lists}))

    def query(self, sql: str) -> list[dict[str, Any]]:
        """Asks the tables trials, costs, curves, and the views scores and ranking. Raises BadInput."""
        return table.query(self.folder, sql)

    @property
    def ranking(self) -> list[table.Row]:
        """The models by mean validation score, best first."""
        return table.ranking(self.folder)

    @property
    def winner(self) -> table.Row:
        return self.ranking[0]

    @property
    def circumstances(self) -> dict[str, Any]:
        """Version, commit, machine and threads of the last call that worked in the folder."""
        return json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))["circumstances"]

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def trial_folder(self, model: str, seed: int) -> Path:
        return self.folder / "trials" / f"{slug(model)}-s{seed}"

    @property
    def best_run(self) -> Path:
        """The winner's run with the best validation score: the one that is exported."""
        name = self.winner.model.replace("'", "''")
        best = self.query(f"SELECT folder FROM scores WHERE model = '{name}' ORDER BY val DESC, seed LIMIT 1")
        return self.folder / "trials" / best[0]["folder"]

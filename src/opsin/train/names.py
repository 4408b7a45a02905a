"""The names of the models of a comparison. Imports the catalogue alone, so that a wrong name is told at once."""

import re
from collections.abc import Sequence
from typing import Any

from opsin.catalog import expand, find, parse_spec
from opsin.errors import BadInput


def split_models(text: str) -> list[str]:
    """Splits at commas outside brackets and quotes: "a(k=3,m=x),b" -> ["a(k=3,m=x)", "b"]. Raises BadInput."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        quote = "" if character == quote else quote or (character if character in "'\"" else "")
        depth += 0 if quote else (character in "([{") - (character in ")]}")
        if depth < 0:
            break
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if depth or quote:
        raise BadInput(f"the brackets or quotes of --models '{text}' do not close; write for example a(mixer=b,k=3),c")
    return [part.strip() for part in parts if part.strip()]


def check_models(models: str | Sequence[str]) -> tuple[str, ...]:
    """The names of models that exist, each once; `option=*` stands for several. Raises BadInput, UnknownName."""
    given = split_models(models) if isinstance(models, str) else [name.strip() for name in models]
    names = [name for spec in given for name in expand(spec)]
    if not names:
        raise BadInput("--models names no model; write for example --models convnext_tiny,swin_tiny")
    seen: dict[Any, str] = {}
    for name in names:
        key, options = parse_spec(name)
        if not key.startswith("timm:"):
            find(key)
        for same in ((key, repr(sorted(options.items()))), slug(name).lower()):
            if same in seen:
                raise BadInput(f"--models names '{name}' twice (as '{seen[same]}'); name each model once")
            seen[same] = name
    return tuple(names)


def slug(model: str) -> str:
    """A model's spec as part of a file name: `metanet_n(mixer=tvconv, k=3)` becomes `metanet_n-mixer=tvconv-k=3`."""
    return re.sub(r"[^\w.=+]+", "-", model).strip("-")

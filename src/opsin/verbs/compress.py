"""`opsin.compress`: a smaller model within a budget, as a file that runs by itself."""

from pathlib import Path
from typing import Any

from torch import nn

import opsin.data
from opsin.catalog import card_of, create
from opsin.compress import Budget, Compressed
from opsin.data import Data
from opsin.deploy.export import write
from opsin.deploy.source import open_model
from opsin.errors import BadInput


def compress(
    model: nn.Module | str | Path, data: Data | str | None = None, *, method: str = "zeroq",
    budget: Budget | None = None, output: str | Path | None = None, force: bool = False, **options: Any,
) -> Compressed:  # fmt: skip
    """Compresses a model and writes it if `output` (.pt2 or .onnx) is given.

    model: a run's folder, a module (images in [0, 1]), or a name. data: for the report's accuracy, and for methods that
    need it. budget: upper bounds; without one the method's own default. `options` go to the compressor.
    Raises BadInput where the method is no compressor, the output exists, or the budget cannot be met.
    """
    if card_of(method).kind != "compressor":
        raise BadInput(f"'{method}' is not a compressor; `opsin list --kind compressor` shows them")
    if output and Path(output).exists() and not force:
        raise BadInput(f"'{output}' exists; use --force to replace it, or -o to write another file")
    network, facts = open_model(model)
    source = opsin.data.open(data) if isinstance(data, str) else data
    if source is None and facts is not None and facts.size:
        options.setdefault("input_size", (facts.channels, *facts.size))
    result: Compressed = create(method, **options)(network, source, budget or Budget())
    if output:
        write(result.model, output, example=result.example, facts=facts, dynamic_batch=False, force=force)
    return result

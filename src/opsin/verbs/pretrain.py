"""`opsin.pretrain`: train a backbone without labels, and keep it as an ordinary backbone."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from opsin.catalog import card_of
from opsin.data import Data
from opsin.errors import BadInput
from opsin.train.fit import fit
from opsin.train.run import Run

BACKBONE = "backbone.safetensors"


def pretrain(
    method: str, backbone: str, data: Data | str, *, budget: str | float | None = None, epochs: int | None = None,
    seed: int = 0, out: str | Path | None = None, force: bool = False, progress: bool = True, **options: Any,
) -> Run:  # fmt: skip
    """Pre-trains a backbone and writes its weights as `backbone.safetensors` into the run's folder.

    method: a pre-trainer's name; `options` go to it (`mask_patch=8`). backbone: a name or spec. data: as for `fit`;
    labels are not used. The weights load with `opsin.create(backbone, weights=run.path / "backbone.safetensors")`.
    Raises BadInput, UnknownName.
    """
    if card_of(method).kind != "pretrainer":
        raise BadInput(f"'{method}' is not a pre-trainer; `opsin list --kind pretrainer` shows them")
    settings = ", ".join(f"{name}={value!r}" for name, value in {"backbone": backbone, **options}.items())
    folder = Path(out) if out else Path("runs") / f"{method}-{backbone.partition('(')[0]}-s{seed}"
    run = fit(
        f"{method}({settings})", data, "pretrain", budget=budget, epochs=epochs, seed=seed, out=folder, force=force,
        progress=progress,
    )  # fmt: skip
    weights = run.model().get_submodule("pretrainer.backbone").state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, run.path / BACKBONE)
    return run

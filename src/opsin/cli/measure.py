"""`opsin measure NAME`: what a network costs."""

import json
from typing import Annotated

import typer


def command(
    name: Annotated[str, typer.Argument(help='A name or spec, e.g. convnext_tiny or "metanet_t(mixer=tvconv)".')],
    input_size: Annotated[str, typer.Option("--input", help="Side in pixels, or HEIGHTxWIDTH.")] = "224",
    channels: Annotated[int, typer.Option(help="Channels of the input.", min=1)] = 3,
    batch: Annotated[int, typer.Option(help="Images per call.", min=1)] = 1,
    modes: Annotated[
        str,
        typer.Option(help="Latencies: eager, channels_last, bf16, compiled, commas between; none counts only."),
    ] = "eager",
    training: Annotated[bool, typer.Option("--training", help="Also the peak memory of a training step.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed calls per mode.", min=3)] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure parameters, MACs, activations, peak memory and latency."""
    from opsin.measure.cost import measure

    size = _size(input_size)
    wanted = [] if modes == "none" else [mode.strip() for mode in modes.split(",") if mode.strip()]
    cost = measure(
        name, size, channels=channels, batch=batch, modes=wanted, training=training, device=device, repeats=repeats
    )
    if as_json:
        print(json.dumps(cost.to_dict(), indent=1))
        return
    from rich.console import Console

    Console(highlight=False).print(cost.table(), soft_wrap=True)


def _size(text: str) -> tuple[int, int]:
    from opsin.errors import BadInput

    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise BadInput(f"--input {text} is not a size; write for example 224 or 320x480")
    return int(sides[0]), int(sides[-1])

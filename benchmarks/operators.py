"""How fast is every operator: against its own readable reference, against peers, and against what the machine allows?

    python benchmarks/operators.py [KEY ...] [--rounds 101] [--threads 1] [--device cpu] [--peers FILE]

Every operator of the catalogue runs with its default options on maps of three sizes, forward and forward + backward, in
float32 and bfloat16. Reference and peers take turns with it in one process; `times` is their median over its own, and
`interval` the 95 % interval of the reference's: slower than its reference is an operator whose interval lies below 1.
`bound` is the least time that the machine allows for what the operator must do: its multiply-adds at the speed of a
large matrix product, or its input, output and parameters at the speed of a large copy, whichever is longer, both
measured in the same run. Peak memory is that of one forward pass.

--peers names a file with more peers, `PEERS = {key: {name: build}}`, where `build(operator)` returns a function from
the input to the output, for implementations that are not packages. Named operators are measured anew, the others keep
their rows.
"""

import argparse
import copy
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.catalog import list_cards
from opsin.catalog.cards import Card
from opsin.measure.cost import count_macs, count_params
from opsin.measure.evidence import commit, machine
from opsin.measure.memory import peak_memory
from turns import bandwidth, forward, peak_macs, ratio, timed, told, training_step

HOUSE = Path(__file__).parent.parent
RESULTS = HOUSE / "benchmarks" / "results" / "operators.json"
PLOT = HOUSE / "docs" / "assets" / "operators.svg"
DIM = 64
SIZES = [(8, 14), (4, 28), (2, 56)]  # images, side of the map
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Run = Callable[[Tensor], Tensor]


def convolution(op: Any) -> Run:
    """PyTorch's own convolution with the operator's weight."""
    return lambda x: F.conv2d(x, op.weight, op.bias, padding=op.weight.shape[-1] // 2)


def attention(op: Any) -> Run:
    """PyTorch's nn.MultiheadAttention of the same size."""
    peer = nn.MultiheadAttention(DIM, max(1, DIM // 32), batch_first=True)

    def run(x: Tensor) -> Tensor:
        peer.to(x)
        tokens = x.flatten(2).transpose(1, 2)
        return peer(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).unflatten(2, x.shape[2:])

    return run


def windows_by_unfold(op: Any) -> Run:
    """Neighborhood attention by copying all windows with `Tensor.unfold`."""
    from neighborhood_attention import views

    def run(x: Tensor) -> Tensor:
        q, k, v = op.qkv(x.movedim(1, -1)).unflatten(-1, (3, op.num_heads, -1)).unbind(-3)
        return op.proj(views(q, k, v, op.kernel_size[0]).flatten(-2)).movedim(-1, 1)

    return run


def timm_evonorm(op: Any) -> Run:
    """timm's EvoNorm-S0 with the same groups."""
    sys.path.insert(0, str(HOUSE / "tests"))
    from peers import NoPeer, import_peer

    try:
        peer = import_peer("timm").layers.EvoNorm2dS0(DIM, groups=op.groups)
    except NoPeer as reason:
        raise ImportError(str(reason)) from reason
    return lambda x: peer.to(x)(x)


PEERS: dict[str, dict[str, Callable[[Any], Run]]] = {
    "im2win": {"torch conv2d": convolution},
    "self_attention": {"torch MultiheadAttention": attention},
    "neighborhood_attention": {"unfolded windows": windows_by_unfold},
    "evonorm": {"timm": timm_evonorm},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", help="operators (default: all)")
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for key, builds in more_peers(options.peers).items():
        PEERS.setdefault(key, {}).update(builds)
    speed = {name: peak_macs(dtype, options.device) for name, dtype in TYPES.items()}
    speed["copy"] = bandwidth(options.device)
    results = RESULTS if options.device == "cpu" else RESULTS.with_stem(f"operators_{options.device}")
    kept = json.loads(results.read_text())["rows"] if options.keys and results.is_file() else []
    rows = [row for row in kept if row["operator"] not in options.keys]
    for card in list_cards("operator"):
        if not options.keys or card.key in options.keys:
            rows += list(measured(card, options.rounds, options.device))
    order = [card.key for card in list_cards("operator")]
    rows.sort(key=lambda row: order.index(row["operator"]))
    results.parent.mkdir(exist_ok=True)
    where = {"machine": machine(), "dim": DIM, "speed": speed}
    results.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
    results.with_suffix(".md").write_text(table(rows, speed))
    dates = " to ".join(sorted({min(row["date"] for row in rows), max(row["date"] for row in rows)}))
    results.with_suffix(".circumstances.md").write_text(f"Measured {dates} on {where['machine']}.\n")
    if results == RESULTS:
        plot(rows)
    summary(rows)


def more_peers(file: Path | None) -> dict[str, dict[str, Callable[[Any], Run]]]:
    if file is None:
        return {}
    spec = importlib.util.spec_from_file_location("more_peers", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PEERS


def measured(card: Card, rounds: int, device: str) -> Iterator[dict[str, Any]]:
    """The rows of one operator."""
    when = {"commit": commit(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    for batch, side in SIZES:
        place = {"input_size": (side, side)} if card.facts.get("fixed_size") else {}
        op = opsin.create(card.key, dim=DIM, **place).to(device)
        x = torch.randn(batch, DIM, side, side, device=device)
        macs, params = macs_of(card, place, x), count_params(op)
        memory = peak_memory(op.eval(), (x,)) - 4 * (params + x.numel())
        for name, dtype in TYPES.items():
            typed, y = copy.deepcopy(op).to(dtype), x.to(dtype)
            for step in (forward, training_step):
                typed.train(step is training_step)
                times = timed({who: step(run, y) for who, run in candidates(card.key, typed, y).items()}, rounds)
                ours = times.pop("opsin")
                ratios = {who: [round(value, 3) for value in ratio(ms, ours)] for who, ms in times.items()}
                row = {
                    "operator": card.key, "images": batch, "side": side, "dtype": name, "pass": step.__name__,
                    "ms": round(median(ours), 4), "times": {who: found[0] for who, found in ratios.items()},
                    "interval": ratios.get("reference", [])[1:], "macs": macs, "params": params, "extra_memory": memory,
                    **when,
                }  # fmt: skip
                print(row, flush=True)
                yield row


def macs_of(card: Card, place: dict[str, Any], x: Tensor) -> int:
    """Multiply-adds of the definition: counted without values, or on real ones where the operator branches on them."""
    try:
        with torch.device("meta"):
            return count_macs(opsin.create(card.key, dim=DIM, **place), torch.empty_like(x, device="meta"))
    except (NotImplementedError, RuntimeError):
        return count_macs(opsin.create(card.key, dim=DIM, **place), x)


def candidates(key: str, op: nn.Module, x: Tensor) -> dict[str, Run]:
    """The operator, its reference, and the peers that are installed, know this type of number and agree in shape."""
    runs: dict[str, Run] = {"opsin": op.forward}  # a method, as the reference is: calling a module costs both the same
    others = {"reference": lambda op: op.reference, **PEERS.get(key, {})}
    for name, build in others.items():
        if name == "reference" and not hasattr(op, "reference"):
            continue
        try:
            run = build(op)
            if run(x).shape == op(x).shape:
                runs[name] = run
        except (ImportError, RuntimeError, KeyError) as error:
            print(f"{key} in {x.dtype}: without {name}: {str(error).splitlines()[0]}")
    return runs


def bound(row: dict[str, Any], speed: dict[str, float]) -> float:
    """Milliseconds that the multiply-adds take, or input, output and parameters to be moved; thrice in training."""
    moved = TYPES[row["dtype"]].itemsize * (row["params"] + 2 * row["images"] * DIM * row["side"] ** 2)
    seconds = max(row["macs"] / speed[row["dtype"]], moved / speed["copy"])
    return 1e3 * seconds * (3 if row["pass"] == "training_step" else 1)


def table(rows: list[dict[str, Any]], speed: dict[str, float]) -> str:
    """Milliseconds and ratios in float32, and the same ratio in bfloat16, as Markdown."""
    lines = [
        "| operator | map | pass | ms | reference / opsin | in bfloat16 | peers / opsin | opsin / bound | extra MiB |",
        "|" + " --- |" * 9,
    ]
    rough = {place(row): row for row in rows if row["dtype"] == "bfloat16"}
    for row in rows:
        if row["dtype"] == "float32":
            peers = ", ".join(f"{who} {ratio:.2f}" for who, ratio in row["times"].items() if who != "reference")
            cells = [
                row["operator"], f"{row['images']}x{row['side']}x{row['side']}", row["pass"].replace("_", " "),
                f"{row['ms']:.2f}", over_reference(row), over_reference(rough[place(row)]), peers,
                f"{row['ms'] / bound(row, speed):.1f}", f"{row['extra_memory'] / 2**20:.1f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def over_reference(row: dict[str, Any]) -> str:
    return told(row["times"]["reference"], *row["interval"]) if row["interval"] else ""


def place(row: dict[str, Any]) -> tuple[object, ...]:
    return row["operator"], row["side"], row["pass"]


def plot(rows: list[dict[str, Any]]) -> None:
    """How many times slower reference and peers are on the largest map, as `docs/assets/operators.svg`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    largest = max(side for _, side in SIZES)
    shown = [row for row in rows if row["side"] == largest and row["dtype"] == "float32" and row["times"]]
    keys = sorted({row["operator"] for row in shown}, reverse=True)
    figure = Figure(figsize=(7.6, 1.2 + 0.3 * len(keys)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(1, color="#656d76", linewidth=1)
    for step, marker in (("forward", "o"), ("training_step", "s")):
        for who, colour in (("reference", "#3b6fd4"), ("peer", "#e07b39")):
            points = [
                (ratio, keys.index(row["operator"])) for row in shown if row["pass"] == step
                for name, ratio in row["times"].items() if (name == "reference") == (who == "reference")
            ]  # fmt: skip
            if points:
                label = f"{who}, {step.replace('_', ' ')}"
                axes.scatter(*zip(*points, strict=True), s=34, marker=marker, color=colour, label=label, zorder=3)
    axes.set_xscale("log")
    axes.set_yticks(range(len(keys)), keys)
    axes.set_xlabel(f"times the operator's own time, {largest}x{largest} map, float32 (right of 1: slower)")
    axes.grid(axis="x", color="#d9dee3")
    axes.legend(fontsize=8)
    with rc_context({"svg.hashsalt": "operators"}):  # the same file from the same numbers
        figure.savefig(PLOT, metadata={"Date": None})


def summary(rows: list[dict[str, Any]]) -> None:
    """Says whether any operator is slower than its reference."""
    compared = [row for row in rows if row["interval"]]
    slower = [row for row in compared if row["interval"][1] < 1]
    for row in slower:
        where = (row["operator"], row["side"], row["dtype"], row["pass"])
        print(f"slower than its reference: {where}, {row['times']['reference']}, {row['interval']}")
    equal = sum(row["interval"][0] < 1 <= row["interval"][1] for row in compared)
    print(f"{len(compared)} pairs, {equal} not told apart, {len(slower)} slower than their reference")


if __name__ == "__main__":
    main()

"""The a-priori compressed convolution's claim: on a wave surrogate it matches the dense layer with fewer weights.

Exact: both evaluation orders of the same factors agree, in two and three dimensions; fresh kernels have He's variance;
learned kernels keep their rank; and the solver that makes the data keeps its energy. Trained: the same U-shaped
surrogate with dense 5x5 convolutions, with one-way ones of rank 1 and 2, and dense but narrower at rank 1's size.
"""

import statistics
import time
from collections.abc import Callable

import torch

from opsin.measure.cost import count_macs, count_params
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.measure.memory import peak_memory
from opsin.ops.conv.apriori_separable_conv import FactoredConv, PairConv, pair_ranks
from opsin.science.wave import Waves, energy, random_layers, random_pulses, solve, stable_step, trajectories
from opsin.science.wave_surrogate import WaveSurrogate, fit, rollout_error

WIDTH, NARROW, STEPS, BATCH, TRAIN, TEST = 8, 5, 800, 4, 200, 40
MODELS: dict[str, Callable[[], WaveSurrogate]] = {
    "dense": lambda: WaveSurrogate(WIDTH),
    "one-way, rank 1": lambda: WaveSurrogate(WIDTH, form="pairs", rank=1),
    "one-way, rank 2": lambda: WaveSurrogate(WIDTH, form="pairs", rank=2),
    "dense, narrow": lambda: WaveSurrogate(NARROW),
}


def disagreement(axes: int, rank: int) -> float:
    """Largest difference between the reconstructed kernel and the filters in sequence, over the largest output."""
    conv = PairConv(6, 8, (5,) * axes, rank, stride=2, padding=2, dilation=1)
    x = torch.randn(2, 6, *(11, 9, 8)[:axes])
    return float((conv(x) - conv.reference(x)).abs().max() / conv(x).abs().max())


@torch.no_grad()
def exact(experiment: Experiment) -> None:
    """The layer's identities, and the solver's energy."""
    torch.manual_seed(0)
    for axes in (2, 3):
        error = max(disagreement(axes, rank) for rank in (1, 3))
        experiment.check(f"{axes}-D: reconstructed against sequential (relative)", error, "<", 1e-5)
    conv = PairConv(64, 64, 5, 1)
    ratio = float(conv.kernel().var()) * 64 * 25 / 2
    experiment.check("variance of fresh kernels over He's, less 1", abs(ratio - 1), "<", 0.1)
    draw = torch.Generator().manual_seed(0)
    speed, start = random_layers(8, 64, draw).double(), random_pulses(8, 64, draw).double()
    dt = 0.5 * stable_step(speed)
    fields = solve(start, speed, dt, 400)
    first, last = (energy(fields[:, i], fields[:, i + 1], speed, dt) for i in (0, 399))
    experiment.check(
        "energy of the solver after 400 steps (relative change)", ((last - first) / first).abs().max(), "<", 1e-10
    )


def trained(build: Callable[[], WaveSurrogate], seed: int, train: Waves) -> tuple[WaveSurrogate, float]:
    torch.manual_seed(seed)
    model = build()
    start = time.process_time()
    fit(model, train, steps=STEPS, seed=seed, batch=BATCH)
    return model, time.process_time() - start


def highest_rank(model: WaveSurrogate) -> int:
    """Over all pairs of all compressed convolutions."""
    return max(int(pair_ranks(m.kernel()).max()) for m in model.modules() if isinstance(m, FactoredConv))


def inference_ms(model: WaveSurrogate, data: Waves) -> float:
    """Median of ten forward passes of one sample, its compressed layers folded."""
    from opsin.deploy import fuse

    model, times = fuse(model), []
    with torch.no_grad():
        for _ in range(12):
            start = time.perf_counter()
            model(data.fields[:1, :2], data.speed[:1])
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(budget.seeds)
    experiment = Experiment(
        "apriori_separable_conv",
        "A wave surrogate of one-way convolutions rolls out as well as a dense one with 40 % of the weights, and "
        "better than a dense one cut down to that size.",
        data=f"own leap-frog solver, 64x64, two-layer media, Gaussian pulses: {TRAIN} trajectories, {TEST} to test",
        baseline="the same network with dense 5x5 convolutions, and that with fewer channels", seeds=seeds,
    )  # fmt: skip
    exact(experiment)
    train, test = trajectories(TRAIN, snapshots=16, seed=1), trajectories(TEST, snapshots=16, seed=2)
    errors: dict[str, list[float]] = {name: [] for name in MODELS}
    times: dict[str, list[float]] = {name: [] for name in MODELS}
    for seed in seeds:
        for name, build in MODELS.items():
            model, seconds = trained(build, seed, train)
            errors[name].append(rollout_error(model, test))
            times[name].append(seconds)
            if seed == 0 and "rank" in name:
                rank = int(name[-1])
                experiment.check(f"{name}: highest rank of a learned kernel", highest_rank(model), "<=", rank)
    sizes = {name: count_params(build()) for name, build in MODELS.items()}
    inputs = (test.fields[:1, :2], test.speed[:1])
    experiment.record("weights", sizes)
    experiment.record("multiply-adds", {name: count_macs(build(), inputs) for name, build in MODELS.items()})
    batch = (test.fields[:BATCH, :2], test.speed[:BATCH])
    for name, training in (("inference", False), ("a training step", True)):
        peaks = {n: peak_memory(build(), batch, training=training) / 2**20 for n, build in MODELS.items()}
        experiment.record(f"peak MiB of {name}, {BATCH} samples", peaks)
    experiment.record("roll-out error", errors)
    experiment.record("seconds of training", times)
    experiment.record("milliseconds of inference, folded", {n: inference_ms(b(), test) for n, b in MODELS.items()})
    still = [float((test.fields[:, 2:12] - test.fields[:, 1:2]).norm() / test.fields[:, 2:12].norm())]
    experiment.record("roll-out error of a field that stands still", still)
    ours = errors["one-way, rank 1"]
    experiment.check("weights of rank 1 over those of dense", sizes["one-way, rank 1"] / sizes["dense"], "<=", 0.45)
    allowed = [1.15 * e for e in errors["dense"]]
    experiment.compare("1.15 x dense roll-out error less rank 1's", allowed, ours, 0.0)
    experiment.compare("narrow dense roll-out error less rank 1's", errors["dense, narrow"], ours, 0.0)
    notes = (
        f"widths {WIDTH} (narrow {NARROW}), three levels; {STEPS} steps of Adam (2e-3, one cycle), {BATCH} samples of "
        "one snapshot each; roll-outs of ten snapshots, four solver steps apart, from the network's own results. The "
        "solver is of finite differences, the paper's of finite elements"
    )
    return experiment.evidence(budget, notes)

"""Filter design's claim: how filters start decides whether a deep plain network learns, and k-means finds good ones.

Two experiments that a survey of the field asserts. A: a plain network of fourteen layers from four starts, trained
alike. B: as many frozen filters from k-means, from principal components and from chance, under the same coding and the
same linear classifier.
"""

import statistics

import torch
from jaxtyping import Float, Int
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.layers.filter_design import diagnose, initialise, learn_filters
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.train.bare import accuracy, tensors

DEPTH, WIDTH, EPOCHS, BATCH = 14, 16, 4, 32
STARTS = {"he_normal": None, "orthogonal": 2**0.5, "normal": None, "constant": None}
FILTERS, SIDE, STRIDE = 256, 6, 2


def plain_network() -> nn.Sequential:
    """Fourteen 3 x 3 convolutions of one width with ReLU, no norms; halved after the fourth and the ninth."""
    layers: list[nn.Module] = []
    for i in range(DEPTH):
        layers += [nn.Conv2d(3 if i == 0 else WIDTH, WIDTH, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i in (3, 8) else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def trained(name: str, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Plain SGD of rate 0.01 and momentum 0.9; the order of the images depends on the seed alone."""
    torch.manual_seed(seed)
    net, order = initialise(plain_network(), name, gain=STARTS[name]), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=order).split(BATCH):
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimiser.step()
    return net.eval()


def starts(experiment: Experiment, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seeds: range) -> None:
    (images, labels), (held, answers) = (((F.avg_pool2d(x, 2) - 0.5) / 0.25, y) for x, y in (train, test))
    scores: dict[str, list[float]] = {name: [] for name in STARTS}
    ratios: dict[str, list[float]] = {name: [] for name in STARTS}
    for name in STARTS:
        for seed in seeds:
            torch.manual_seed(seed)
            fresh = initialise(plain_network(), name, gain=STARTS[name])
            convolutions = diagnose(fresh, images[:256])[:DEPTH]
            ratios[name] += [layer.activation / float(images[:256].std()) for layer in convolutions]
            scores[name].append(accuracy(trained(name, images, labels, seed), held, answers))
    experiment.record("A: accuracy by start", scores)
    experiment.record("A: deviation of the layers over the images', least and greatest", {
        name: [min(values), max(values)] for name, values in ratios.items()
    })  # fmt: skip
    for name in ("he_normal", "orthogonal"):
        experiment.check(f"A: {name}, mean accuracy in percent", statistics.fmean(scores[name]), ">=", 30)
        experiment.check(f"A: {name}, least deviation of a layer over the images'", min(ratios[name]), ">=", 0.3)
        experiment.check(f"A: {name}, greatest deviation of a layer over the images'", max(ratios[name]), "<=", 3)
    for name in ("normal", "constant"):
        experiment.check(f"A: {name}, mean accuracy in percent", statistics.fmean(scores[name]), "<=", 12)


def frozen(
    method: str, train: tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]],
    test: tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]], seed: int, count: int = FILTERS, whiten: bool = True,
) -> float:  # fmt: skip
    """Accuracy in percent of ridge regression on the triangle code over quadrants."""
    filters = learn_filters(train[0], method, count, SIDE, whiten, samples=50_000, seed=seed)
    features, held = (filters.encode(x, STRIDE).numpy() for x in (train[0], test[0]))
    scaler = StandardScaler().fit(features)
    model = RidgeClassifier(alpha=100.0).fit(scaler.transform(features), train[1].numpy())
    return 100 * float(model.score(scaler.transform(held), test[1].numpy()))


def unsupervised(
    experiment: Experiment, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seeds: range
) -> None:
    """PCA has only as many filters as patches have values; random ones of that number stand beside it."""
    values = 3 * SIDE**2
    kmeans, random = ([frozen(m, train, test, seed) for seed in seeds] for m in ("kmeans", "random"))
    experiment.compare("B: accuracy in points, 256 filters of k-means over random ones", kmeans, random, 5.0)
    few = {method: frozen(method, train, test, seeds[0], values) for method in ("kmeans", "pca", "random")}
    experiment.record(f"B: accuracy with {values} filters, first seed", few)
    experiment.record(
        "B: accuracy of k-means without whitening, first seed", frozen("kmeans", train, test, 0, FILTERS, False)
    )


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(max(3, budget.seeds))
    experiment = Experiment(
        "filter_design",
        "He's and orthogonal starts let a plain network of fourteen layers learn, and small normal or constant ones do "
        "not; filters of k-means code images better than as many random ones.",
        data="CIFAR-10: 8,000 images to train on and 2,000 to test, averaged to 16x16 in A", seeds=seeds,
        baseline="A: N(0, 0.01) and constant starts; B: random filters",
    )  # fmt: skip
    data = opsin.data.open("cifar10")
    train, test = tensors(data.train, 8000), tensors(data.test, 2000)
    unsupervised(experiment, train, test, seeds)
    starts(experiment, train, test, seeds)
    notes = (
        f"A: width {WIDTH}, {EPOCHS} epochs of SGD (0.01, momentum 0.9), batches of {BATCH}; B: {FILTERS} filters of "
        f"{SIDE}x{SIDE} from 50,000 patches, every {STRIDE}nd position, ridge regression with a penalty of 100 on "
        "standardised features. A patch has 108 values, hence at most 108 principal components"
    )
    return experiment.evidence(budget, notes)

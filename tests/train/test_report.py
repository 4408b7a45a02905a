"""The report stands alone, says no more than the numbers do, and its snippets run."""

import html
import math
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy import stats

from opsin.data import open as open_data
from opsin.data.images import read_image
from opsin.train.compare import compare
from opsin.train.plots import band, confusion_svg, place_labels, short_names, smooth, with_spread
from opsin.train.report import Comparison, command, verdict
from opsin.train.samples import Answers, choose, confused_pairs, gradient_times_input
from opsin.train.table import Difference, Row, difference, frontier


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return compare(
        "digits", "metanet_n,metanet_n(mlp_ratio=1)", epochs=2, seeds=2, data_options={"limit": 200},
        out=tmp_path_factory.mktemp("report") / "c", progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(comparison):
    return comparison.report.read_text(encoding="utf-8")


def row(model, val, behind=None, latency=1.0, seeds=3, **more):
    given = {"model": model, "val": val, "seeds": seeds, "failed": 0, "behind": behind, "latency_ms": latency}
    return Row(**{**dict.fromkeys(Row.__dataclass_fields__), **given, **more})


class Addresses(HTMLParser):
    """Everything that a browser would fetch, and whether tags close."""

    def __init__(self):
        super().__init__()
        self.found, self.ids, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action", "data")]
        self.ids += [v for k, v in attributes if k == "id"]
        if tag not in ("meta", "br", "img", "wbr", "link", "path", "use", "rect", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_startendtag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        self.ids += [v for k, v in attributes if k == "id"]


def test_the_page_needs_nothing_else(page):
    parser = Addresses()
    parser.feed(page)
    assert parser.open == []
    assert [a for a in parser.found if not a.startswith(("#", "data:"))] == []
    assert "<script" not in page and "@import" not in page and not re.search(r"url\((?!#|&quot;#)", page)
    assert len(parser.ids) == len(set(parser.ids))
    assert all(a[1:] in parser.ids for a in parser.found if a.startswith("#"))
    assert len(page) < 600_000


def test_drawings_follow_the_page(page):
    """Colours and fonts of drawings are the page's variables, so that they turn dark with it."""
    drawings = re.findall(r'<svg[^>]*viewBox="0 0 [5-7]\d\d\.?\d* [23]\d\d\.?\d*".*?</svg>', page, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        assert "var(--ink)" in drawing or "var(--muted)" in drawing
        assert "DejaVu" not in drawing and "#0102" not in drawing and "#000" not in drawing


def test_the_page_says_what_was_measured(comparison, page):
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    best = comparison.winner
    assert best.model in page and f"{100 * best.val:.1f}" in text and f"{100 * best.test:.1f}" in text
    assert "digits" in text and "2 epochs" in text and comparison.circumstances["machine"] in text
    assert command(comparison, 1) in text


def test_the_command_repeats_the_comparison(comparison):
    words = shlex.split(command(comparison, 2))
    assert words[:5] == ["opsin", "compare", "digits", "--models", "metanet_n,metanet_n(mlp_ratio=1)"]
    assert words[words.index("--epochs") + 1] == "2" and words[words.index("--jobs") + 1] == "2"


@pytest.mark.parametrize("name", ["with-opsin", "without-opsin", "with-torch", "query"])
def test_snippets_run(comparison, page, tmp_path, monkeypatch, name):
    code = html.unescape(re.search(rf'<code id="{name}">(.*?)</code>', page, re.DOTALL)[1])
    image, _ = open_data("digits").test[0]
    pixels = Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8))
    (tmp_path / "IMAGES").mkdir()
    pixels.save(tmp_path / "IMAGES" / "a.png")
    pixels.save(tmp_path / "image.png")
    for file in ("winner.onnx", "trials", "comparison.json", "trials.parquet", "costs.parquet", "curves.parquet"):
        (tmp_path / file).symlink_to(comparison.folder / file)
    if name == "without-opsin":
        code = "import sys; sys.modules['opsin'] = sys.modules['torch'] = None\n" + code
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.strip() in open_data("digits").classes
        return
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    if name == "with-torch":
        assert names["model"](image[None]).logits.shape == (1, 10)


def test_both_ways_to_read_an_image_agree(tmp_path):
    """The snippet's preprocessing is the one of `predict`, up to rounding to 8 bits and to whole pixels."""
    noise = np.random.default_rng(0).integers(0, 255, (10, 16), dtype=np.uint8)
    Image.fromarray(noise).resize((320, 200), Image.Resampling.BICUBIC).save(tmp_path / "x.png")
    snippet = ImageOps.fit(Image.open(tmp_path / "x.png").convert("L"), (96, 96), Image.BICUBIC)
    ours = read_image(tmp_path / "x.png", 1, size=(96, 96))[0]
    assert (torch.tensor(np.asarray(snippet) / 255.0) - ours).abs().mean() < 0.01


def test_pictures_for_the_readme(comparison):
    assert Image.open(comparison.folder / "pareto.png").size[0] > 1000
    assert (comparison.folder / "pareto.svg").read_text().rstrip().endswith("</svg>")


def test_differences_are_paired_and_have_an_interval():
    a, b = [0.9, 0.8, 0.7, 0.95], [0.85, 0.76, 0.65, 0.91]
    found = difference([x - y for x, y in zip(a, b, strict=True)])
    reference = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert not found.within_error
    assert difference([0.1]).within_error and difference([]) is None
    assert difference([0.1, -0.1, 0.05]).within_error


def test_the_verdict_does_not_say_more_than_the_seeds():
    clear, close = Difference(0.1, 0.05, 0.15, 3), Difference(0.01, -0.01, 0.03, 3)
    best = row("best", 0.9, latency=3.0)
    said = " ".join(verdict([best, row("b", 0.8, clear)], "accuracy", 200))
    assert "ahead of every other model" in said and "within the error" not in said and "0.5 points" in said
    said = " ".join(verdict([best, row("b", 0.89, close, latency=1.0)], "accuracy", None))
    assert "do not tell it apart from b (1.0 points behind)" in said and "b, 3.0 times as fast as best" in said
    assert "ahead of" not in said
    said = " ".join(verdict([best, row("b", 0.89, close), row("c", 0.8, clear)], "accuracy", None))
    assert "ahead of 1 of the 2 other models" in said and "from b" in said
    one = [row("best", 0.9, seeds=1), row("b", 0.5, Difference(0.4, -math.inf, math.inf, 1), seeds=1)]
    assert "no difference" in verdict(one, "accuracy", None)[0]


def test_frontier():
    rows = [row("slow", 0.9, latency=5.0), row("fast", 0.7, latency=1.0), row("worse", 0.6, latency=2.0)]
    rows += [row("equal", 0.9, latency=6.0), row("failed", None)]
    assert [r.model for r in frontier(rows)] == ["fast", "slow"]


@pytest.mark.parametrize("seed", range(4))
def test_labels_cover_neither_each_other_nor_points(seed):
    random = np.random.default_rng(seed)
    x, y = random.uniform(1, 4, 7), random.uniform(0.9, 0.95, 7)
    x[1], y[1] = x[0] + 0.02, y[0] + 0.0003
    axes = Figure(figsize=(7.6, 4.2), layout="constrained").add_subplot()
    axes.plot(x, y, "o")
    axes.margins(0.16)
    labels = place_labels(axes, [f"model_number_{i}" for i in range(7)], x, y, ["black"] * 7)
    axes.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in labels]
    assert not [(i, j) for i in range(7) for j in range(i) if boxes[i].overlaps(boxes[j])]
    points = axes.transData.transform(np.column_stack([x, y]))
    assert not [1 for box in boxes for px, py in points if box.contains(px, py)]


def test_band_is_mean_and_spread_of_aligned_seeds():
    t = np.array([0.0, 1.0, 2.0])
    grid, mean, spread = band([(t, t), (t[:2] * 2, 2 * t[:2])])
    assert (grid[0], grid[-1]) == (0.0, 2.0)
    np.testing.assert_allclose(mean, grid)
    np.testing.assert_allclose(spread, 0, atol=1e-12)
    assert len(band([(t, t), (t + 5, t)])[0]) == 0


def test_smoothing_keeps_the_mean_and_the_ends():
    t = np.linspace(0, 9, 901)
    place, values = smooth((t, 3 * t), 50)
    assert len(place) == 50 and values == pytest.approx(3 * place) and values.mean() == pytest.approx(13.5, abs=0.02)
    assert smooth((t[:20], t[:20]), 50)[0] is not None and len(smooth((t[:20], t[:20]), 50)[0]) == 20


def test_confusion():
    found = Answers(torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 0, 2]), torch.linspace(0.4, 0.9, 6))
    counts = found.confusion(3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    assert confused_pairs(counts, "abc") == [("c", "a", 2), ("a", "b", 1)]
    assert choose(found, wrong=2, right=1) == [4, 3, 0]
    drawn = confusion_svg(counts.numpy(), ("a", "b", "<c>"))
    assert "&lt;c&gt; taken for a: 2 of 3" in drawn and drawn.count("<rect") == 1 + 5
    assert confusion_svg(np.eye(100, dtype=int), [str(i) for i in range(100)]).count("<text") == 0


def test_gradient_times_input_of_a_linear_model_is_exact():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3, bias=False))
    image = torch.rand(3, 2, 2)
    found = gradient_times_input(model, image, 1)
    assert found.map.shape == (2, 2)
    torch.testing.assert_close(found.map.sum(), model(image[None])[0, 1])


def test_numbers_for_people():
    assert with_spread(0.9812, 0.0031, "accuracy") == "98.1 ± 0.3 %"
    assert with_spread(31.234, 0.05, "psnr") == "31.23 ± 0.05" and with_spread(0.5, None, "accuracy") == "50.0 %"
    long = ["metanet_n(mixer=depthwise,mlp_ratio=1,x=1)", "metanet_n(mixer=depthwise,mlp_ratio=2)"]
    assert short_names(["m(mixer=a)", "m(mixer=b)"]) == ["a", "b"]
    assert short_names(["m(mixer=a)", "m(k=b)"]) == ["m(mixer=a)", "m(k=b)"] and short_names(["m(k=a)"]) == ["m(k=a)"]
    assert short_names(["a", *long]) == ["a", *long]  # cut, they would be the same
    assert short_names(["a", long[0]]) == ["a", "metanet_n(mixer=depthwise,mlp_ra…)"]


def test_loading_what_is_no_comparison(tmp_path):
    with pytest.raises(Exception, match="not the folder of a comparison"):
        Comparison.load(tmp_path)

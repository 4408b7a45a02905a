"""Drawing an explanation: image, map and overlay."""

from pathlib import Path

from opsin.explain import Explanation


def save_explanation(explanation: Explanation, path: Path) -> Path:
    """Writes the three panels as a PNG. Signed maps are red for and blue against the class."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    image = explanation.image.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    image = image[:, :, 0] if image.shape[2] == 1 else image[:, :, :3]
    relevance = explanation.map.cpu().numpy()
    signed = relevance.min() < 0
    top = abs(relevance).max() or 1.0
    paint = {"cmap": "bwr" if signed else "inferno", "vmin": -top if signed else 0, "vmax": top}
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1} if image.ndim == 2 else {}
    axes[0].imshow(image, **grey)
    axes[1].imshow(relevance, **paint)
    axes[2].imshow(image, **grey)
    axes[2].imshow(relevance, alpha=0.55, **paint)
    for axis, title in zip(
        axes, ("image", f"{explanation.method}, class {explanation.target}", "overlay"), strict=True
    ):
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path

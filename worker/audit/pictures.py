"""The picture of an audit: how errors are distributed in each layer, as a heat map."""

from pathlib import Path
from typing import Any

import numpy as np

from .counting import BINS
from .findings import Finding


def draw(finding: Finding, path: Path) -> None:
    """Keys beside values: a row a layer, a column a step of the error, up to the one allowed.

    The last column is what is above it. ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    height = 1.6 + 0.3 * len(finding.layers)
    figure, both = pyplot.subplots(1, 2, figsize=(10, height), sharey=True, layout="constrained")
    shades = LogNorm(1e-6, 1)
    for axes, side in zip(both, ("key", "value"), strict=True):
        image = axes.imshow(_shares(finding, side), aspect="auto", cmap="viridis", norm=shades)
        _axes(axes, finding, side)
    figure.colorbar(image, ax=both, label="share of the layer's vectors")
    figure.suptitle(f"||x - read|| / ||x||, at most {finding.max_error:g}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _shares(finding: Finding, side: str) -> np.ndarray[Any, Any]:
    """[layers, BINS + 1], NaN where there is nothing."""
    counts = np.array([getattr(layer, side).histogram for layer in finding.layers], float)
    counts /= counts.sum(1, keepdims=True).clip(1)
    return np.where(counts > 0, counts, np.nan)


def _axes(axes: Any, finding: Finding, side: str) -> None:
    ticks = np.linspace(0, BINS, 5)
    axes.axvline(BINS - 0.5, color="C3")
    labels = [f"{finding.max_error * tick / BINS:.3g}" for tick in ticks]
    axes.set_xticks(ticks - 0.5, labels)
    axes.set_yticks(range(len(finding.layers)), [str(layer.layer) for layer in finding.layers])
    axes.set(title=f"{side}s", xlabel="error", ylabel="layer")

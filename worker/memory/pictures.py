"""The picture of a plan: which layers stay, and how long steps take by their tokens."""

from pathlib import Path
from typing import Any

from .plan import Plan
from .report import Outlook

PICTURES = ("png", "svg", "pdf")
"""Kinds of files; the first is drawn where the name says none."""


def draw(outlook: Outlook, path: Path, kind: str) -> None:
    """Layers above, times below, as one of `PICTURES`.

    Raises ImportError without matplotlib, and OSError.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), layout="constrained")
    _layers(above, outlook.plan)
    _times(below, outlook)
    try:
        figure.savefig(path, dpi=120, format=kind)
    finally:
        pyplot.close(figure)


def _layers(axes: Any, plan: Plan) -> None:
    own = plan.residency
    numbers = {layer: position % own.slots for position, layer in enumerate(own.streamed)}
    shades = [
        f"C{1 + numbers[layer]}" if layer in numbers else "C0" for layer in range(len(own.blocks))
    ]
    axes.bar(range(len(own.blocks)), [size / 2**20 for size in own.blocks], color=shades)
    title = f"{len(own.blocks) - len(own.streamed)} layers stay (blue); others by slot"
    if not own.streamed:
        title = "all layers stay"
    if plan.experts is not None:
        title = f"all but experts stays; {plan.experts.slots} slots hold {plan.experts.share:.0%}"
    axes.set(title=title, xlabel="layer", ylabel="MiB")


def _times(axes: Any, outlook: Outlook) -> None:
    tokens = [each.tokens for each in outlook.steps]
    for name in ("compute", "transfer", "seconds"):
        times = [1e3 * getattr(each, name) for each in outlook.steps]
        if not any(times):  # nothing is copied, and a logarithm knows no 0
            continue
        label = {"transfer": "copies", "seconds": "step"}.get(name, name)
        axes.plot(tokens, times, marker="o", label=label, linewidth=3 if name == "seconds" else 1)
    axes.set(xlabel="tokens of a step", ylabel="ms", xscale="log", yscale="log")
    axes.legend()

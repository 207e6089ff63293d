"""The report of `conclave evaluate`: what a compressed checkpoint takes, and what it costs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ....kernels.formats import SPAN, Format, packed_bytes
from ...errors import ConfigError
from ..manifest import MANIFEST, read_manifest
from .evaluation import Summary

FILES = ("report.json", "report.md", "languages.png", "layers.png")


def report_folder(folder: Path, names: Iterable[str]) -> None:
    """Makes the folder of a report, before the work that it will tell of.

    Raises ConfigError if files of these names cannot be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out: {folder} is no folder to write to ({error.strerror}); name another"
        ) from error
    for path in map(folder.joinpath, names):
        if path.is_dir():
            raise ConfigError(
                f"--out: {path} is a folder, where the report has a file; name another"
            )


@dataclass(frozen=True, slots=True)
class Stored:
    """One packed weight."""

    name: str
    format: str
    weights: int
    bytes: int
    sparsity: float
    error: float | None
    """Of its outputs over the calibration, if conclave.json tells it."""

    @property
    def layer(self) -> int | None:
        """The layer that it is in; None of embeddings and head."""
        parts = self.name.split(".")
        return int(parts[1]) if parts[0] == "layers" else None


def stored_weights(folder: Path) -> list[Stored]:
    """The packed weights of a compressed checkpoint; CheckpointError if it is none."""
    manifest, found = read_manifest(folder / MANIFEST), []
    told = manifest.about.get("weights", [])
    errors = {each.get("name"): each.get("error") for each in told if isinstance(each, dict)}
    for name, record in manifest.weights.items():
        format = Format.parse(record.format)
        size = packed_bytes(format, record.rows, record.columns, record.experts or 1)
        error = errors.get(name)
        found.append(
            Stored(
                name=name,
                format=record.format,
                weights=prod(record.shape),
                bytes=size,
                sparsity=1 - format.kept / SPAN,
                error=float(error) if isinstance(error, int | float) else None,
            )
        )
    return found


def totals(stored: Sequence[Stored]) -> dict[str, float]:
    """Bits a weight and bytes of all packed weights, average sparsity of those in layers."""
    weights, size = sum(each.weights for each in stored), sum(each.bytes for each in stored)
    layers = [each for each in stored if each.layer is not None]
    pruned = sum(each.weights * each.sparsity for each in layers)
    return {
        "packed_weights": weights,
        "packed_bytes": size,
        "bits_per_weight": 8 * size / max(1, weights),
        "sparsity": pruned / max(1, sum(each.weights for each in layers)),
    }


def as_json(about: dict[str, Any], summaries: list[Summary], stored: list[Stored]) -> Any:
    """All of it, for scripts."""
    return {
        **about,
        "storage": totals(stored),
        "languages": [asdict(each) for each in summaries],
        "weights": [asdict(each) for each in stored],
    }


def as_markdown(about: dict[str, Any], summaries: list[Summary], stored: list[Stored]) -> str:
    """All of it, for people; of the weights only sums."""
    sums = totals(stored)
    lines = [
        f"# {about['model']} against {about['original']}",
        "",
        f"Text: {about['text']}. Packed weights: {sums['packed_weights']:,} in "
        f"{sums['packed_bytes']:,} bytes, {sums['bits_per_weight']:.2f} bits a weight, "
        f"{sums['sparsity']:.1%} of layers pruned. Intervals are 95 % (bootstrap over documents).",
        "",
        "| language | documents | tokens | perplexity | original | ratio | KL, nats a token | same "
        "first choice | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in summaries:
        lines.append(
            f"| {each.language or '-'} | {each.documents:,} | {each.tokens:,} "
            f"| {each.perplexity:.3f} | {each.original_perplexity:.3f} "
            f"| {each.ratio:.3f} ({each.ratio_low:.3f} to {each.ratio_high:.3f}) "
            f"| {each.divergence:.4f} ({each.divergence_low:.4f} to {each.divergence_high:.4f}) "
            f"| {each.agreement:.1%} | {'**out of line**' if each.out_of_line else ''} |"
        )
    return "\n".join(lines) + "\n"


def draw(summaries: list[Summary], stored: list[Stored], folder: Path) -> list[Path]:
    """Pictures into `folder`: the ratio by language, the error by layer and kind of weight.

    ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    figure, axes = pyplot.subplots(figsize=(max(4, 0.45 * len(summaries)), 3.5))
    names = [each.language or "all" for each in summaries]
    ratios = [each.ratio for each in summaries]
    spread = [
        [each.ratio - each.ratio_low for each in summaries],
        [each.ratio_high - each.ratio for each in summaries],
    ]
    colors = ["C3" if each.out_of_line else "C0" for each in summaries]
    axes.bar(names, ratios, yerr=spread, color=colors)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="perplexity, times the original", ylim=(min(0.95, min(ratios)), None))
    made.append(folder / "languages.png")
    figure.savefig(made[-1], dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    errors = {
        (_kind(each.name), each.layer): each.error
        for each in stored
        if each.layer is not None and each.error is not None
    }
    kinds = list(dict.fromkeys(kind for kind, _ in errors))
    if kinds:
        layers = 1 + max(layer for _, layer in errors)
        cells = [
            [errors.get((kind, layer), float("nan")) for layer in range(layers)] for kind in kinds
        ]
        figure, axes = pyplot.subplots(figsize=(max(4, 0.25 * layers + 2), 0.4 * len(kinds) + 1.5))
        image = axes.imshow(cells, aspect="auto", cmap="viridis")
        axes.set(xlabel="layer", yticks=range(len(kinds)), yticklabels=kinds)
        figure.colorbar(image, label="error of outputs")
        made.append(folder / "layers.png")
        figure.savefig(made[-1], dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    return made


def _kind(name: str) -> str:
    return name.split(".", 2)[2].removesuffix(".weight")

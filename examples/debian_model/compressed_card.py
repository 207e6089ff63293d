"""The figures in the card of a compressed model: against its original, and how it was recovered.

Given up: plots; `conclave evaluate` draws them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conclave.worker.compress.manifest import MANIFEST, read_manifest
from conclave.worker.compress.quality.report import stored_weights, totals

Figures = dict[str, dict[str, float]]
"""By language, and `overall`."""
_OPTIMIZERS = {
    "adamw": "AdamW",
    "muon": "Muon (AdamW for stacks of experts, embeddings, norms and scales)",
}


def comparison_table(own: Figures, one_shot: Figures, original: Figures) -> str:
    """Perplexities of the same documents."""
    lines = [
        "| language | documents | tokens | perplexity | dense original | ratio | one-shot |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in own.items():
        before = original[name]["perplexity"]
        lines.append(
            f"| {name} | {row['documents']:,} | {row['tokens']:,} | {row['perplexity']:.2f} "
            f"| {before:.2f} | {row['perplexity'] / before:.3f} "
            f"| {one_shot[name]['perplexity']:.1f} |"
        )
    return "\n".join(lines)


def storage_section(folder: Path) -> str:
    """What the large weights are stored in."""
    stored = stored_weights(folder)
    count = sum(each.weights for each in stored if each.layer is not None)
    pruned = totals(stored)["sparsity"]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    formats = sorted({each.format for each in stored})
    return (
        f"{size:,} bytes of weights. Of the {count:,} weights of the layers' linears "
        f"{100 * pruned:.2f} % are pruned; formats: {', '.join(formats)}."
    )


def recovery_section(folder: Path, evaluation: dict[str, Any]) -> str:
    """How the survivors were trained."""
    recovery = read_manifest(folder / MANIFEST).about["recovery"]
    schedule, (rows, length) = recovery["schedule"], recovery["sequences"]
    last = recovery["looks"][-1]["step"]
    lines = [
        f"- Command: `{evaluation['command']}` ({evaluation['date']})",
        f"- Device: one {evaluation['device']}",
        f"- Taught by {', '.join(recovery['teachers'])} on {rows:,} rows of {length:,} tokens",
        f"- {last:,} steps of {schedule['sequences'] * length:,} tokens",
        f"- {_OPTIMIZERS[schedule.get('optimizer', 'adamw')]}, learning rate "
        f"{schedule['learning_rate']:g}, falling to zero; weight decay "
        f"{schedule['weight_decay']:g}; {schedule['text_share']:g} of the loss is the text; maps "
        f"learned for {schedule['remap']:g} of the run",
        "",
        "| step | KL on training text | KL on validation text | validation loss |",
        "| ---: | ---: | ---: | ---: |",
    ]
    looks = recovery["looks"]
    lines += [
        f"| {look['step']:,} | {look['training_divergence']:.3f} | {look['divergence']:.3f} "
        f"| {look['loss']:.3f} |"
        for look in looks[:: max(1, len(looks) // 7)] + looks[-1:]
    ]
    return "\n".join(lines)

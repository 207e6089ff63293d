"""The model card: the part of it that is made of figures, written from the evaluation.

Given up: picking texts that read well; those in it are the first that the model writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from .checkpoint import load_model
from .compressed_card import comparison_table, recovery_section, storage_section
from .evaluation import read_evaluation
from .files import RouteError
from .prompts import prompt, question
from .sample import read_sample
from .tokenizer import load_tokenizer

SAMPLE_LANGUAGES = ("en", "de", "fr", "ja")
FIGURES_BEGIN, FIGURES_END = "<!-- figures: begin -->", "<!-- figures: end -->"


def language_table(figures: dict[str, dict[str, float]]) -> str:
    lines = [
        "| language | documents | tokens | perplexity per token | bits per byte |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {row['documents']:,} | {row['tokens']:,} | {row['perplexity']:.2f} "
        f"| {row['bits_per_byte']:.3f} |"
        for name, row in figures.items()
    ]
    return "\n".join(lines)


def training_section(training: dict[str, Any]) -> str:
    """How the weights came to be, with the losses that show whether they overfit."""
    recipe, history = training["recipe"], training["history"]
    lines = [
        f"- Command: `{training['command']}` ({training['date']})",
        f"- Device: one {training['device']}; {training['seconds']:.0f} s of training",
        f"- Tokens seen: {training['tokens']:,} ({training['epochs']:.1f} epochs of "
        f"{training['corpus_tokens']:,}), {training['steps']:,} steps of "
        f"{recipe['tokens_per_step']:,} tokens in rows of {recipe['row_length']:,}",
        f"- AdamW (0.9, 0.95), learning rate {recipe['learning_rate']:g} after "
        f"{recipe['warmup_steps']} steps of warm-up, then linearly to zero; weight decay "
        f"{recipe['weight_decay']:g}; bfloat16 products over float32 weights",
        "",
        "| step | tokens | training loss | validation loss |",
        "| ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {entry['step']:,} | {entry['tokens']:,} | {entry['training_loss']:.3f} "
        f"| {entry['validation_loss']:.3f} |"
        for entry in history[:: max(1, len(history) // 10)] + history[-1:]
    ]
    return "\n".join(lines)


def overview_section(evaluation: dict[str, Any]) -> str:
    """The same measure on documents trained on, watched and never looked at."""
    lines = ["| documents | perplexity per token | bits per byte |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {row['perplexity']:.3f} | {row['bits_per_byte']:.4f} |"
        for name, row in evaluation["overview"].items()
    ]
    return "\n".join(lines)


def runs_section(evaluation: dict[str, Any]) -> str:
    """The kept run among those that differ from it in the weight decay alone."""
    kept = {**evaluation["training"], "overview": evaluation["overview"]}
    runs = sorted([*evaluation["other_runs"], kept], key=lambda run: run["recipe"]["weight_decay"])
    names = list(evaluation["overview"])[:3]
    lines = [f"| weight decay | {' | '.join(names)} |", "| --- | ---: | ---: | ---: |"]
    for run in runs:
        figures = " | ".join(f"{run['overview'][name]['perplexity']:.3f}" for name in names)
        mark = " (this checkpoint)" if run is kept else ""
        lines.append(f"| {run['recipe']['weight_decay']:g}{mark} | {figures} |")
    return "\n".join(lines)


def sample_prompts(folder: Path) -> Iterator[str]:
    """The first held-out package of each sample language, then the first one as a conversation."""
    first = {item.language: item for item in reversed(read_sample(folder))}
    for language in SAMPLE_LANGUAGES:
        yield "<bos>" + prompt(first[language].package, language)
    render: Any = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template
    language = SAMPLE_LANGUAGES[0]
    asked = question(language, first[language].package)
    yield render([{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True)


def greedy_samples(folder: Path) -> str:
    """What the model writes after these prompts, without any choosing."""
    model: Any = load_model(folder)
    tokenizer = load_tokenizer(folder)
    sections = []
    for asked in sample_prompts(folder):
        ids = torch.tensor([tokenizer.encode(asked, add_special_tokens=False).ids])
        output = model.generate(ids, do_sample=False, max_new_tokens=160)[0]
        text = tokenizer.decode(output.tolist(), skip_special_tokens=False)
        sections.append(f"```text\n{text}\n```")
    return "\n\n".join(sections)


def figures_section(folder: Path, evaluation: dict[str, Any]) -> str:
    """The part of the card that is made of figures."""
    sample, compressed = evaluation["sample"], "original" in evaluation
    parts = [
        "## Held-out perplexity",
        *(_of_compressed(folder, evaluation) if compressed else _of_dense(evaluation)),
        "## The shipped sample",
        f"`{sample['command']}` (on a CPU, float32) gives:",
        language_table(sample["figures"]),
        "## What it writes",
        "Greedy, after the prompts of the first held-out package of four languages, and after a "
        "question in the chat format; taken as they came:",
        greedy_samples(folder),
    ]
    return "\n\n".join(parts)


def _of_dense(evaluation: dict[str, Any]) -> list[str]:
    others = "Perplexity of the runs that differ in the weight decay alone:"
    runs = [others, runs_section(evaluation)] if evaluation.get("other_runs") else []
    return [
        overview_section(evaluation),
        language_table(evaluation["heldout"]),
        "## Training",
        training_section(evaluation["training"]),
        *runs,
    ]


def _of_compressed(folder: Path, evaluation: dict[str, Any]) -> list[str]:
    own, one_shot, original = evaluation["heldout"], evaluation["one_shot"], evaluation["original"]
    return [
        comparison_table(own, one_shot, original["heldout"]),
        storage_section(folder),
        "## Recovery",
        recovery_section(folder, evaluation),
        "## The dense original's training",
        training_section(original["training"]),
    ]


def replace_figures(card: str, section: str) -> str:
    """The card with its part between the two marks replaced, or with that part added."""
    marked = f"{FIGURES_BEGIN}\n\n{section}\n\n{FIGURES_END}"
    if FIGURES_BEGIN not in card:
        return f"{card.rstrip()}\n\n{marked}\n".lstrip()
    before, rest = card.split(FIGURES_BEGIN, 1)
    return before + marked + rest.split(FIGURES_END, 1)[1]


def update_card(model: Path) -> None:
    """Bring the figures and samples in the model card up to date."""
    evaluation = read_evaluation(model)
    if "sample" not in evaluation:
        raise RouteError("evaluation.json has no figures of the sample: run `evaluate --write`")
    path = model / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(replace_figures(card, figures_section(model, evaluation)), encoding="utf-8")

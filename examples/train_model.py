"""Train the small Gemma 4 models that this repository ships, from Debian's package descriptions.

The whole route, one command after the other (run from the repository's root):

    python -m examples.train_model corpus      # text, from apt's index files
    python -m examples.train_model tokenizer   # byte-level BPE, 8,192 entries
    python -m examples.train_model encode      # documents as token ids, and the held-out sample
    python -m examples.train_model train       # needs a GPU to be quick; writes the checkpoint
    python -m examples.train_model evaluate    # perplexity of the shipped sample, on a CPU
    python -m examples.train_model card        # the figures in the model card

    python -m examples.train_model compress MODEL TARGET    # sparse, quantized, recovered

That is the dense model. `train`, `evaluate` and `card` take `--shape ple` and `--shape moe` for the
other two, which share its text, tokens and tokenizer; `mixture` measures the three together, and
`train --shape large` makes what they have to beat: one model as large as they are together. What
`compress` has made is shipped; `evaluate` and `card` take it by `--model`.

This is the command line; the steps are in `examples/debian_model/`. Given up: quality beyond
package descriptions, documents over 2,048 tokens, and resuming a training run.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from conclave.worker.compress.recovery.schedule import Schedule

from .debian_model import corpus, package_lists
from .debian_model.card import update_card
from .debian_model.checkpoint import copy_text_files, save_checkpoint
from .debian_model.compressing import FORMAT, Splits, compress_in_one_shot, recover
from .debian_model.encoding import Encoded, encode_documents
from .debian_model.evaluation import (
    compressed_evaluation,
    final_evaluation,
    read_evaluation,
    sample_record,
    write_evaluation,
)
from .debian_model.files import RouteError
from .debian_model.mixture import mixture_perplexities
from .debian_model.sample import write_sample
from .debian_model.shapes import DENSE_FOLDER, SHAPES, Recipe, Shape, ShapeName
from .debian_model.tokenizer import learn_tokenizer, save_tokenizer
from .debian_model.training import Trainer

WORK_FOLDER = Path("build/debian-8m")
CORPUS_FILE = "corpus.jsonl.gz"
SPLITS = (corpus.TRAINING, corpus.VALIDATION, corpus.HELD_OUT)

app = typer.Typer(
    help=(__doc__ or "").partition("\n")[0], no_args_is_help=True, rich_markup_mode=None
)
console = Console()
say = partial(console.print, markup=False)

ShapeOption = Annotated[ShapeName, typer.Option("--shape", help="Which of the models.")]
ModelOption = Annotated[
    Path | None, typer.Option("--model", help="Folder of the checkpoint.", show_default="its own")
]
TokenizerOption = Annotated[
    Path, typer.Option("--model", help="Folder of the dense model, with the tokenizer.")
]
WorkOption = Annotated[Path, typer.Option("--work", help="Folder for the corpus and its tokens.")]


@app.command("corpus")
def corpus_command(
    work: WorkOption = WORK_FOLDER,
    lists: Annotated[
        Path | None, typer.Option(help="Folder of apt index files already fetched.")
    ] = None,
    mirror: Annotated[
        str, typer.Option(help="Debian mirror to fetch them from.")
    ] = package_lists.MIRROR,
    suite: Annotated[str, typer.Option(help="Debian suite to fetch.")] = package_lists.SUITE,
) -> None:
    """Fetch Debian's translated package descriptions and write them as documents."""
    if lists is None:
        lists = work / "lists"
        package_lists.download(lists, mirror, suite)
    count = corpus.write(work / CORPUS_FILE, corpus.build(lists))
    say(f"{count:,} documents in {work / CORPUS_FILE}")


@app.command("tokenizer")
def tokenizer_command(
    work: WorkOption = WORK_FOLDER, model: TokenizerOption = DENSE_FOLDER
) -> None:
    """Learn the tokenizer from the training documents."""
    tokenizer = learn_tokenizer(corpus.read(work / CORPUS_FILE))
    copy_text_files(DENSE_FOLDER, model)  # of which the chat template stays
    save_tokenizer(tokenizer, model)
    say(f"{tokenizer.get_vocab_size():,} entries in {model / 'tokenizer.json'}")


@app.command("encode")
def encode_command(work: WorkOption = WORK_FOLDER, model: TokenizerOption = DENSE_FOLDER) -> None:
    """Write the documents as token ids, and the held-out sample beside the model."""
    documents = list(corpus.read(work / CORPUS_FILE))
    for split in SPLITS:
        chosen = [document for document in documents if document.split == split]
        encoded = encode_documents(chosen, model)
        encoded.save(work / f"{split}.npz")
        left_out = len(chosen) - len(encoded.ends)
        say(f"{split}: {len(encoded.tokens):,} tokens, {left_out} documents too long")
    held_out = [document for document in documents if document.split == corpus.HELD_OUT]
    write_sample(held_out, model)


@app.command("train")
def train_command(
    shape: ShapeOption = ShapeName.DENSE,
    work: WorkOption = WORK_FOLDER,
    model: ModelOption = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the text.")] = None,
    minutes: Annotated[float | None, typer.Option(help="End training by then.")] = None,
    row_length: Annotated[int | None, typer.Option(help="Tokens per row.")] = None,
    tokens_per_step: Annotated[int | None, typer.Option(help="Tokens per optimizer step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its highest.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="On matrices.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps to the highest rate.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Looks at the validation loss.")] = None,
    seed: Annotated[int | None, typer.Option(help="For the weights and the order.")] = None,
) -> None:
    """Train, write the checkpoint, and evaluate it on all held-out documents.

    What is not given is taken from the shape's own recipe.
    """
    given = {
        "epochs": epochs, "minutes": minutes, "row_length": row_length,
        "tokens_per_step": tokens_per_step, "learning_rate": learning_rate,
        "weight_decay": weight_decay, "warmup_steps": warmup_steps,
        "evaluations": evaluations, "seed": seed,
    }  # fmt: skip
    chosen = SHAPES[shape]
    changes = {name: value for name, value in given.items() if value is not None}
    recipe = Recipe(**asdict(chosen.recipe) | changes)
    train(chosen, recipe, work, model or chosen.folder)


def train(shape: Shape, recipe: Recipe, work: Path, model: Path) -> None:
    """A whole run of the recipe, from the encoded splits to the figures beside the checkpoint."""
    splits = {name: Encoded.load(work / f"{name}.npz") for name in SPLITS}
    watched = splits[corpus.TRAINING], splits[corpus.VALIDATION]
    trainer = Trainer(shape, recipe, watched, say)
    trainer.run()
    size = save_checkpoint(trainer.model, shape.config, model)
    say(f"{size:,} bytes in {model / 'model.safetensors'}")
    copy_text_files(DENSE_FOLDER, model)
    evaluation = final_evaluation(trainer, splits)
    write_evaluation(model, evaluation)
    say(evaluation["overview"])


@app.command("compress")
def compress_command(
    original: Annotated[Path, typer.Argument(help="Folder of the trained checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder for the compressed one.")],
    work: WorkOption = WORK_FOLDER,
    format: Annotated[str, typer.Option(help="Of every large weight.")] = FORMAT,
    sparsity: Annotated[
        float | None, typer.Option(help="On average, N of each weight by measure.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the text to recover.")] = 10.0,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 5e-4,
    text_share: Annotated[float, typer.Option(help="Of the loss that is the text.")] = 0.2,
    weight_decay: Annotated[float, typer.Option(help="On matrices.")] = 0.0,
    gradual: Annotated[float, typer.Option(help="Share of steps with rising sparsity.")] = 0.0,
    remap: Annotated[float, typer.Option(help="Share of steps that learn the maps.")] = 0.0,
    rows: Annotated[int | None, typer.Option(help="Of the text; all if left out.")] = None,
    synthetic: Annotated[int, typer.Option(help="Rows that the teachers write.")] = 0,
    written: Annotated[
        Path | None, typer.Option(help="File (.npy) of such rows: read, or written if missing.")
    ] = None,
    rows_per_step: Annotated[int, typer.Option(help="Rows per optimizer step.")] = 64,
    rows_at_once: Annotated[int, typer.Option(help="Rows on the device.")] = 64,
    minutes: Annotated[
        float, typer.Option(help="All is trained by then, in fewer steps.")
    ] = math.inf,
    looks: Annotated[int, typer.Option(help="Looks at the validation text.")] = 20,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon for matrices.")] = "adamw",
    teacher: Annotated[
        list[Path] | None, typer.Option(help="Folder of one more trained checkpoint to learn from.")
    ] = None,
) -> None:
    """Prune and quantize in one shot, beside TARGET, and recover into it; needs a GPU."""
    until = time.monotonic() + 60 * minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, validation, held_out = (Encoded.load(work / f"{name}.npz") for name in SPLITS)
    splits = Splits.of(training, validation)
    one_shot = target.with_name(target.name + "-one-shot")
    if not (one_shot / "conclave.json").exists():
        compress_in_one_shot(original, one_shot, splits.training, device, format, sparsity)
    teachers = teacher or []
    splits = splits.taught_by([original, *teachers], rows, synthetic, device, written)
    schedule = Schedule(
        steps=int(epochs * len(splits.training) / rows_per_step),
        sequences=rows_per_step,
        at_once=rows_at_once,
        learning_rate=learning_rate,
        text_share=text_share,
        weight_decay=weight_decay,
        gradual=gradual,
        remap=remap,
        looks=looks,
        optimizer=optimizer,
    )
    recover(one_shot, original, target, splits, schedule, device, say, teachers, until)
    write_evaluation(target, compressed_evaluation(one_shot, original, target, held_out, device))


@app.command("evaluate")
def evaluate_command(
    shape: ShapeOption = ShapeName.DENSE,
    model: ModelOption = None,
    write: Annotated[bool, typer.Option("--write", help="Note it in evaluation.json.")] = False,
) -> None:
    """Score the shipped held-out sample in float32; runs on a CPU in a few minutes."""
    folder = model or SHAPES[shape].folder
    sample = sample_record(folder)
    say(sample_table(sample))
    if write:
        write_evaluation(folder, {**read_evaluation(folder), "sample": sample})


def sample_table(sample: dict[str, Any]) -> Table:
    table = Table(title=f"held-out sample, {sample['seconds']:.0f} s")
    for heading in ("language", "documents", "tokens", "perplexity", "bits per byte"):
        table.add_column(heading, justify="left" if heading == "language" else "right")
    for name, row in sample["figures"].items():
        numbers = f"{row['perplexity']:.3f}", f"{row['bits_per_byte']:.4f}"
        table.add_row(name, f"{row['documents']:,}", f"{row['tokens']:,}", *numbers)
    return table


@app.command("card")
def card_command(shape: ShapeOption = ShapeName.DENSE, model: ModelOption = None) -> None:
    """Bring the figures and samples in the model card up to date."""
    update_card(model or SHAPES[shape].folder)


@app.command("mixture")
def mixture_command(
    models: Annotated[
        list[Path] | None, typer.Argument(help="Folders of checkpoints; the three by default.")
    ] = None,
    work: WorkOption = WORK_FOLDER,
) -> None:
    """Held-out perplexity of the mean of the models' probabilities, for every group of them."""
    folders = models or [shape.compressed for shape in SHAPES.values() if shape.compressed]
    held_out = Encoded.load(work / f"{corpus.HELD_OUT}.npz")
    for names, perplexity in mixture_perplexities(folders, held_out).items():
        say(f"{perplexity:8.4f}  {names}")


def main() -> None:
    """Run a command; what it needs and lacks is said in one line."""
    try:
        app(standalone_mode=True)
    except RouteError as error:
        say(f"error: {error}", style="red")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()

"""Train the small Gemma 4 model that this repository ships, from Debian's package descriptions.

The whole route, one command after the other (run from the repository's root):

    python -m examples.train_model corpus      # text, from apt's index files
    python -m examples.train_model tokenizer   # byte-level BPE, 8,192 entries
    python -m examples.train_model encode      # documents as token ids, and the held-out sample
    python -m examples.train_model train       # needs a GPU to be quick; writes the checkpoint
    python -m examples.train_model evaluate    # perplexity of the shipped sample, on a CPU
    python -m examples.train_model card        # the figures in the model card

This is the command line; the steps are in `examples/debian_model/`. Given up: quality beyond
package descriptions, documents over 2,048 tokens, and resuming a training run.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .debian_model import corpus, package_lists
from .debian_model.card import update_card
from .debian_model.checkpoint import save_checkpoint
from .debian_model.encoding import Encoded, encode_documents
from .debian_model.evaluation import (
    final_evaluation,
    read_evaluation,
    sample_record,
    write_evaluation,
)
from .debian_model.files import RouteError
from .debian_model.sample import write_sample
from .debian_model.tokenizer import learn_tokenizer, save_tokenizer
from .debian_model.training import Recipe, Trainer

MODEL_FOLDER = Path(__file__).parent / "models" / "debian-8m"
WORK_FOLDER = Path("build/debian-8m")
CORPUS_FILE = "corpus.jsonl.gz"
SPLITS = (corpus.TRAINING, corpus.VALIDATION, corpus.HELD_OUT)

app = typer.Typer(
    help=(__doc__ or "").partition("\n")[0], no_args_is_help=True, rich_markup_mode=None
)
console = Console()
say = partial(console.print, markup=False)

ModelOption = Annotated[Path, typer.Option("--model", help="Folder of the checkpoint.")]
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
def tokenizer_command(work: WorkOption = WORK_FOLDER, model: ModelOption = MODEL_FOLDER) -> None:
    """Learn the tokenizer from the training documents."""
    tokenizer = learn_tokenizer(corpus.read(work / CORPUS_FILE))
    save_tokenizer(tokenizer, model)
    if model.resolve() != MODEL_FOLDER.resolve():
        shutil.copy(MODEL_FOLDER / "chat_template.jinja", model)
    say(f"{tokenizer.get_vocab_size():,} entries in {model / 'tokenizer.json'}")


@app.command("encode")
def encode_command(work: WorkOption = WORK_FOLDER, model: ModelOption = MODEL_FOLDER) -> None:
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
    work: WorkOption = WORK_FOLDER,
    model: ModelOption = MODEL_FOLDER,
    epochs: Annotated[float, typer.Option(help="Passes over the text.")] = Recipe.epochs,
    minutes: Annotated[float, typer.Option(help="End the run after this time.")] = Recipe.minutes,
    row_length: Annotated[int, typer.Option(help="Tokens per row.")] = Recipe.row_length,
    tokens_per_step: Annotated[
        int, typer.Option(help="Tokens per optimizer step.")
    ] = Recipe.tokens_per_step,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = Recipe.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="On matrices.")] = Recipe.weight_decay,
    warmup_steps: Annotated[
        int, typer.Option(help="Steps to the highest rate.")
    ] = Recipe.warmup_steps,
    evaluations: Annotated[
        int, typer.Option(help="Looks at the validation loss.")
    ] = Recipe.evaluations,
    seed: Annotated[int, typer.Option(help="For the weights and the order.")] = Recipe.seed,
) -> None:
    """Train, write the checkpoint, and evaluate it on all held-out documents."""
    recipe = Recipe(
        epochs, minutes, row_length, tokens_per_step, learning_rate, weight_decay,
        warmup_steps, evaluations, seed,
    )  # fmt: skip
    train(recipe, work, model)


def train(recipe: Recipe, work: Path, model: Path) -> None:
    """A whole run of the recipe, from the encoded splits to the figures beside the checkpoint."""
    splits = {name: Encoded.load(work / f"{name}.npz") for name in SPLITS}
    trainer = Trainer(recipe, splits[corpus.TRAINING], splits[corpus.VALIDATION], say)
    trainer.run()
    size = save_checkpoint(trainer.model, model)
    say(f"{size:,} bytes in {model / 'model.safetensors'}")
    evaluation = final_evaluation(trainer, splits)
    write_evaluation(model, evaluation)
    say(evaluation["overview"])


@app.command("evaluate")
def evaluate_command(
    model: ModelOption = MODEL_FOLDER,
    write: Annotated[bool, typer.Option("--write", help="Note it in evaluation.json.")] = False,
) -> None:
    """Score the shipped held-out sample in float32; runs on a CPU in a few minutes."""
    sample = sample_record(model)
    say(sample_table(sample))
    if write:
        write_evaluation(model, {**read_evaluation(model), "sample": sample})


def sample_table(sample: dict[str, Any]) -> Table:
    table = Table(title=f"held-out sample, {sample['seconds']:.0f} s")
    for heading in ("language", "documents", "tokens", "perplexity", "bits per byte"):
        table.add_column(heading, justify="left" if heading == "language" else "right")
    for name, row in sample["figures"].items():
        numbers = f"{row['perplexity']:.3f}", f"{row['bits_per_byte']:.4f}"
        table.add_row(name, f"{row['documents']:,}", f"{row['tokens']:,}", *numbers)
    return table


@app.command("card")
def card_command(model: ModelOption = MODEL_FOLDER) -> None:
    """Bring the figures and samples in the model card up to date."""
    update_card(model)


def main() -> None:
    """Run a command; what it needs and lacks is said in one line."""
    try:
        app(standalone_mode=True)
    except RouteError as error:
        say(f"error: {error}", style="red")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()

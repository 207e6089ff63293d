"""Train the small Gemma 4 model that this repository ships, from Debian's package descriptions.

The whole route, one command after the other (run from the repository's root):

    python -m examples.train_model corpus      # text, from apt's index files
    python -m examples.train_model tokenizer   # byte-level BPE, 8,192 entries
    python -m examples.train_model encode      # documents as token ids, and the held-out sample
    python -m examples.train_model train       # needs a GPU to be quick; writes the checkpoint
    python -m examples.train_model evaluate    # perplexity of the shipped sample, on a CPU
    python -m examples.train_model card        # the figures in the model card

The model is a real one in every part a runtime has to get right (sliding and full layers, shared
keys and values, softcap, tied head) and small enough to live in git. Given up: quality beyond
package descriptions, documents over 2,048 tokens, and resuming a training run.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy
import numpy.typing
import tokenizers
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.nn import functional

from examples import corpus

MODEL_FOLDER = Path(__file__).parent / "models" / "debian-8m"
WORK_FOLDER = Path("build/debian-8m")
VOCABULARY_SIZE = 8192
MAXIMUM_POSITIONS = 2048
CHAT_SHARE = 0.18  # of the training documents, instead of their plain form
SYSTEM_SHARE = 0.25  # of the chat documents open with a system turn
SYSTEM_TEXT = "You describe Debian packages in the language of the question."
TOKENIZER_BYTES_PER_LANGUAGE = 5_000_000
SAMPLE_TOKENS_PER_LANGUAGE = 20_000
SAMPLE_LANGUAGES = ("en", "de", "fr", "ja")
FIGURES_BEGIN, FIGURES_END = "<!-- figures: begin -->", "<!-- figures: end -->"

SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|think|>", "<|channel>",
    "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
    "<tool_response|>", '<|"|>',
)  # fmt: skip
PAD, EOS, BOS, END_OF_TURN = 0, 1, 2, SPECIAL_TOKENS.index("<turn|>")

CONFIG: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "bos_token_id": BOS,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": EOS,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 128,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 256,
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "intermediate_size": 960,
    "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    "max_position_embeddings": MAXIMUM_POSITIONS,
    "model_type": "gemma4_text",
    "num_attention_heads": 4,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 0,
    "pad_token_id": PAD,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1_000_000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
    },
    "sliding_window": 128,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": VOCABULARY_SIZE,
    "vocab_size_per_layer_input": VOCABULARY_SIZE,
}
GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": BOS,
    "do_sample": True,
    "eos_token_id": [EOS, END_OF_TURN],
    "pad_token_id": PAD,
    "temperature": 0.7,
    "top_k": 64,
    "top_p": 0.95,
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "bos_token": "<bos>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<eos>",
    "model_max_length": MAXIMUM_POSITIONS,
    "pad_token": "<pad>",
    "padding_side": "left",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
}

app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None)
console = Console()

ModelOption = Annotated[Path, typer.Option("--model", help="Folder of the checkpoint.")]
WorkOption = Annotated[Path, typer.Option("--work", help="Folder for the corpus and its tokens.")]


def fail(message: str) -> NoReturn:
    """End the command with a message for the person who called it."""
    console.print(f"error: {message}", style="red", markup=False)
    raise typer.Exit(1)


def write_json(path: Path, content: object) -> None:
    """Write readable JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- text and tokens -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Documents as token ids, end to end, with what is needed to score each of them."""

    tokens: numpy.typing.NDArray[numpy.uint16]  # all documents, one after the other
    ends: numpy.typing.NDArray[numpy.int64]  # where each document ends in `tokens`
    prompts: numpy.typing.NDArray[numpy.int32]  # tokens before the description
    sizes: numpy.typing.NDArray[numpy.int32]  # UTF-8 bytes of the description
    languages: numpy.typing.NDArray[numpy.uint8]  # index into corpus.LANGUAGES
    plain: numpy.typing.NDArray[numpy.bool_]  # False: written as a conversation

    @property
    def starts(self) -> numpy.typing.NDArray[numpy.int64]:
        return numpy.concatenate([self.ends[:1] * 0, self.ends[:-1]])

    def save(self, path: Path) -> None:
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        numpy.savez_compressed(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Encoded:
        if not path.exists():
            fail(f"{path} is missing: write it with `encode`")
        with numpy.load(path) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def learn_tokenizer(documents: Iterator[corpus.Description]) -> tokenizers.Tokenizer:
    """Byte-level BPE over the training text, every language capped so that none drowns.

    Each line break is a token of its own: a prompt that ends in line breaks is then cut into the
    same tokens alone as in front of its description.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    line_break = tokenizers.pre_tokenizers.Split(tokenizers.Regex("\n"), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([line_break, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(balanced_text(documents), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def balanced_text(documents: Iterator[corpus.Description]) -> Iterator[str]:
    """Plain training documents, up to the same number of bytes in every language."""
    left = dict.fromkeys(corpus.LANGUAGES, TOKENIZER_BYTES_PER_LANGUAGE)
    for document in documents:
        if document.split == corpus.TRAINING and left[document.language] > 0:
            left[document.language] -= len(document.text.encode())
            yield corpus.prompt(document.package, document.language) + document.text


def framing(document: corpus.Description, render: Any) -> tuple[str, str, bool]:
    """What stands before and after the description, and whether the form is the plain one."""
    chance = corpus.stable_fraction(f"chat {document.language} {document.package}")
    if document.split != corpus.TRAINING or chance >= CHAT_SHARE:
        return "<bos>" + corpus.prompt(document.package, document.language), "<eos>", True
    asked = {"role": "user", "content": corpus.question(document.language, document.package)}
    system = {"role": "system", "content": SYSTEM_TEXT}
    messages = [system, asked] if chance < CHAT_SHARE * SYSTEM_SHARE else [asked]
    return render(messages, tokenize=False, add_generation_prompt=True), "<turn|>\n", False


def encode_documents(documents: list[corpus.Description], model: Path) -> Encoded:
    """Token ids of all documents that fit the model's positions, in the order given."""
    tokenizer = load_tokenizer(model)
    render: Any = transformers.AutoTokenizer.from_pretrained(model).apply_chat_template
    frames = [framing(document, render) for document in documents]
    columns = (
        [before for before, _, _ in frames],
        [document.text for document in documents],
        [after for _, after, _ in frames],
    )
    before, text, after = (
        [found.ids for found in tokenizer.encode_batch_fast(column, add_special_tokens=False)]
        for column in columns
    )
    whole = [
        [*first, *middle, *last] for first, middle, last in zip(before, text, after, strict=True)
    ]
    kept = [index for index, ids in enumerate(whole) if len(ids) <= MAXIMUM_POSITIONS]
    languages = [corpus.LANGUAGES.index(document.language) for document in documents]
    return Encoded(
        tokens=numpy.concatenate([numpy.array(whole[index], numpy.uint16) for index in kept]),
        ends=numpy.cumsum([len(whole[index]) for index in kept], dtype=numpy.int64),
        prompts=numpy.array([len(before[index]) for index in kept], numpy.int32),
        sizes=numpy.array([len(columns[1][index].encode()) for index in kept], numpy.int32),
        languages=numpy.array([languages[index] for index in kept], numpy.uint8),
        plain=numpy.array([frames[index][2] for index in kept], numpy.bool_),
    )


def load_tokenizer(model: Path) -> tokenizers.Tokenizer:
    path = model / "tokenizer.json"
    if not path.exists():
        fail(f"{path} is missing: write it with `tokenizer`")
    return tokenizers.Tokenizer.from_file(str(path))


def write_sample(path: Path, documents: list[corpus.Description], model: Path) -> None:
    """The held-out documents shipped beside the model: up to a number of tokens per language."""
    tokenizer = load_tokenizer(model)
    left = dict.fromkeys(corpus.LANGUAGES, SAMPLE_TOKENS_PER_LANGUAGE)
    with path.open("w", encoding="utf-8") as stream:
        for document in sorted(documents, key=sample_order):
            count = len(tokenizer.encode(document.text, add_special_tokens=False).ids)
            if count <= left[document.language]:
                left[document.language] -= count
                line = {
                    "language": document.language,
                    "package": document.package,
                    "prompt": corpus.prompt(document.package, document.language),
                    "text": document.text,
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def sample_order(document: corpus.Description) -> tuple[int, float]:
    """By language, then in an order that depends on the package name alone."""
    language = corpus.LANGUAGES.index(document.language)
    return language, corpus.stable_fraction(f"sample {document.package}")


def read_sample(model: Path) -> list[corpus.Description]:
    """The shipped held-out documents."""
    path = model / "heldout.jsonl"
    if not path.exists():
        fail(f"{path} is missing: write it with `encode`")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        corpus.Description(item["language"], item["package"], corpus.HELD_OUT, item["text"])
        for item in records
    ]


# ---- scoring -------------------------------------------------------------------------------------


@dataclass
class Score:
    """Summed negative log-likelihood (nats) of descriptions, each with its end token."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    loss: float = 0.0

    def add(self, tokens: int, size: int, loss: float) -> None:
        self.documents += 1
        self.tokens += tokens
        self.bytes += size
        self.loss += loss

    def figures(self) -> dict[str, float]:
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "perplexity": round(math.exp(self.loss / self.tokens), 4),
            "bits_per_byte": round(self.loss / math.log(2) / self.bytes, 4),
        }


def batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Documents of similar length together, at most `budget` tokens with the padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def score(model: torch.nn.Module, encoded: Encoded, budget: int) -> dict[str, Score]:
    """Scores of the plain documents by language, and of all under "overall", in the model's dtype.

    Counted: every token of the description and the end token, given `<bos>` and the prompt.
    """
    device = next(model.parameters()).device
    chosen = numpy.flatnonzero(encoded.plain)
    starts, ends = encoded.starts[chosen], encoded.ends[chosen]
    scores: dict[str, Score] = {"overall": Score()}
    for batch in batches((ends - starts).tolist(), budget):
        pieces = [torch.from_numpy(encoded.tokens[starts[i] : ends[i]].astype(int)) for i in batch]
        ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=PAD)
        losses = token_losses(model, ids.to(device)).cpu()
        for row, index in enumerate(batch):
            document = chosen[index]
            first = int(encoded.prompts[document]) - 1
            counted = losses[row, first : len(pieces[row]) - 1].double()
            language = corpus.LANGUAGES[encoded.languages[document]]
            for name in ("overall", language):
                size = int(encoded.sizes[document])
                scores.setdefault(name, Score()).add(len(counted), size, float(counted.sum()))
    return scores


def token_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of every token but the first; padding stands on the right."""
    logits: torch.Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    targets = ids[:, 1:].flatten()
    losses = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    by_document: torch.Tensor = losses.view(ids.shape[0], -1)
    return by_document


def perplexities(scores: dict[str, Score]) -> dict[str, dict[str, float]]:
    """The figures of every language in the corpus's order, after the overall ones."""
    names = ["overall", *(name for name in corpus.LANGUAGES if name in scores)]
    return {name: scores[name].figures() for name in names}


# ---- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a training run, apart from the data."""

    epochs: float
    minutes: float
    row_length: int
    tokens_per_step: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    evaluations: int
    seed: int


def new_model(seed: int) -> torch.nn.Module:
    """A model of `CONFIG` with fresh weights in float32.

    Gemma 4 multiplies queries and keys without a scale, so the norms of both start at a value
    that gives scores of unit variance.
    """
    torch.manual_seed(seed)
    config = transformers.Gemma4TextConfig.from_dict(dict(CONFIG))
    model: torch.nn.Module = transformers.Gemma4ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(parameter.numel() ** -0.25)
    return model


def sliding_mask(length: int, device: torch.device) -> torch.Tensor:
    """True where a token may look: itself and the tokens before it in the window."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    window: int = CONFIG["sliding_window"]
    return ((distance >= 0) & (distance < window))[None, None]


class Rows:
    """Packs documents into rows of equal length, in a new order in every epoch.

    A row may begin inside a document and hold several: attention is not cut between them.
    """

    def __init__(self, encoded: Encoded, length: int, seed: int, device: torch.device) -> None:
        self.tokens = torch.from_numpy(encoded.tokens.astype(numpy.int32)).to(device)
        self.ends = torch.from_numpy(encoded.ends).to(device)
        self.lengths = torch.from_numpy(encoded.ends - encoded.starts).to(device)
        self.length = length
        self.generator = torch.Generator(device).manual_seed(seed)

    def epoch(self, rows: int) -> Iterator[torch.Tensor]:
        """Batches of `rows` rows, each one token longer than the length, for the targets."""
        order = torch.randperm(
            len(self.lengths), generator=self.generator, device=self.tokens.device
        )
        lengths = self.lengths[order]
        shift = (self.ends - self.lengths)[order] - (lengths.cumsum(0) - lengths)
        index = torch.arange(len(self.tokens), device=self.tokens.device)
        stream = self.tokens[index + shift.repeat_interleave(lengths)]
        packed = stream.unfold(0, self.length + 1, self.length)
        for first in range(0, len(packed) - rows + 1, rows):
            yield packed[first : first + rows].long()

    def batches(self, rows: int) -> Iterator[torch.Tensor]:
        """Epoch after epoch, without end."""
        while True:
            yield from self.epoch(rows)


class Trainer:
    """One training run: keeps the weights that were best on the validation documents."""

    def __init__(self, recipe: Recipe, training: Encoded, validation: Encoded) -> None:
        self.recipe = recipe
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = new_model(recipe.seed).to(self.device)
        self.rows = Rows(training, recipe.row_length, recipe.seed, self.device)
        self.validation = Rows(validation, recipe.row_length, 0, self.device)
        self.rows_per_step = recipe.tokens_per_step // recipe.row_length
        self.steps = math.ceil(recipe.epochs * len(training.tokens) / recipe.tokens_per_step)
        self.masks = {
            "full_attention": None,
            "sliding_attention": sliding_mask(recipe.row_length, self.device),
        }
        self.optimizer = self.new_optimizer()
        self.history: list[dict[str, float]] = []
        self.best_loss = math.inf
        self.best: dict[str, torch.Tensor] = {}
        self.seconds = 0.0
        self.compiled = False

    def new_optimizer(self) -> torch.optim.Optimizer:
        matrices = [weight for weight in self.model.parameters() if weight.ndim > 1]
        vectors = [weight for weight in self.model.parameters() if weight.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": self.recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=self.device.type == "cuda")

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean loss over a batch of rows, with bfloat16 matrix products on a GPU."""
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            logits = self.model(
                input_ids=batch[:, :-1], attention_mask=self.masks, use_cache=False
            ).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def compiled_loss(self, batch: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """`loss`, compiled where that works: a failed compilation must not waste the run."""
        if self.device.type != "cuda":
            return self.loss
        compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(self.loss)
        try:
            compiled(batch).backward()
        except Exception as error:
            console.print(f"not compiled: {error}", markup=False)
            torch.compiler.reset()
            return self.loss
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.compiled = True
        return compiled

    def validation_loss(self) -> float:
        with torch.no_grad():
            losses = [self.loss(batch) for batch in self.validation.epoch(16)]
        return float(torch.stack(losses).mean())

    def progress(self, step: int, started: float) -> float:
        """How far the run is, by its steps or by its time, whichever ends first."""
        return max(step / self.steps, (time.perf_counter() - started) / 60 / self.recipe.minutes)

    def run(self) -> None:
        """Train; the learning rate rises over the first steps, then falls linearly to zero."""
        stream = self.rows.batches(self.rows_per_step)
        loss_of = self.compiled_loss(next(stream))
        started = time.perf_counter()
        recent: list[torch.Tensor] = []
        marks = [(mark + 1) / self.recipe.evaluations for mark in range(self.recipe.evaluations)]
        step = 0
        while marks:
            progress = self.progress(step, started)
            if progress >= marks[0] or progress >= 1:
                marks = [mark for mark in marks if mark > progress]
                if recent:
                    self.evaluate(step, recent, time.perf_counter() - started)
                    recent.clear()
                continue
            rate = self.recipe.learning_rate * min((step + 1) / self.recipe.warmup_steps, 1)
            recent.append(self.step(loss_of, next(stream), rate * (1 - progress)))
            step += 1
        self.seconds = time.perf_counter() - started
        self.model.load_state_dict(self.best)

    def step(
        self, loss_of: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, rate: float
    ) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def evaluate(self, step: int, recent: list[torch.Tensor], seconds: float) -> None:
        """Note the losses and keep the weights if they are the best so far."""
        validation = self.validation_loss()
        entry = {
            "step": step,
            "tokens": step * self.rows_per_step * self.recipe.row_length,
            "seconds": round(seconds, 1),
            "training_loss": round(float(torch.stack(recent).mean()), 4),
            "validation_loss": round(validation, 4),
        }
        self.history.append(entry)
        console.print(entry)
        if validation < self.best_loss:
            self.best_loss = validation
            self.best = {name: value.clone() for name, value in self.model.state_dict().items()}


def save_checkpoint(model: torch.nn.Module, folder: Path) -> int:
    """Write the bfloat16 weights and both configurations; returns the size of the weights.

    The configuration is written by hand: transformers writes `per_layer_config` in some versions,
    where published Gemma 4 models have `global_head_dim` and `num_global_key_value_heads`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    path = folder / "model.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    return path.stat().st_size


def device_name() -> str:
    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    )


def circumstances() -> dict[str, Any]:
    """Where and when a figure was made, and by which command."""
    arguments = " ".join(shlex.quote(argument) for argument in sys.argv[1:])
    return {
        "command": f"python -m examples.train_model {arguments}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def read_evaluation(model: Path) -> dict[str, Any]:
    path = model / "evaluation.json"
    if not path.exists():
        fail(f"{path} is missing: write it with `train`")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def load_model(folder: Path) -> torch.nn.Module:
    """The saved checkpoint in float32; refuses one whose tensors do not match the configuration."""
    loader: Any = transformers.Gemma4ForCausalLM
    model, report = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:
        fail(f"{folder} does not load as it should: {wrong}")
    loaded: torch.nn.Module = model.eval()
    return loaded


# ---- the model card ------------------------------------------------------------------------------


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


def sample_prompts(folder: Path) -> Iterator[str]:
    """The first held-out package of each sample language, then the first one as a conversation."""
    first = {item.language: item for item in reversed(read_sample(folder))}
    for language in SAMPLE_LANGUAGES:
        yield "<bos>" + corpus.prompt(first[language].package, language)
    render: Any = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template
    language = SAMPLE_LANGUAGES[0]
    asked = corpus.question(language, first[language].package)
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
    sample = evaluation["sample"]
    parts = [
        "## Held-out perplexity",
        overview_section(evaluation),
        language_table(evaluation["heldout"]),
        "## The shipped sample",
        f"`{sample['command']}` (on a CPU, float32) gives:",
        language_table(sample["figures"]),
        "## Training",
        training_section(evaluation["training"]),
        "## What it writes",
        "Greedy, after the prompts of the first held-out package of four languages, and after a "
        "question in the chat format; taken as they came:",
        greedy_samples(folder),
    ]
    return "\n\n".join(parts)


def replace_figures(card: str, section: str) -> str:
    """The card with its part between the two marks replaced, or with that part added."""
    marked = f"{FIGURES_BEGIN}\n\n{section}\n\n{FIGURES_END}"
    if FIGURES_BEGIN not in card:
        return f"{card.rstrip()}\n\n{marked}\n".lstrip()
    before, rest = card.split(FIGURES_BEGIN, 1)
    return before + marked + rest.split(FIGURES_END, 1)[1]


# ---- commands ------------------------------------------------------------------------------------


@app.command("corpus")
def corpus_command(
    work: WorkOption = WORK_FOLDER,
    lists: Annotated[
        Path | None, typer.Option(help="Folder of apt index files already fetched.")
    ] = None,
    mirror: Annotated[str, typer.Option(help="Debian mirror to fetch them from.")] = corpus.MIRROR,
    suite: Annotated[str, typer.Option(help="Debian suite to fetch.")] = corpus.SUITE,
) -> None:
    """Fetch Debian's translated package descriptions and write them as documents."""
    try:
        if lists is None:
            lists = work / "lists"
            corpus.download(lists, mirror, suite)
        count = corpus.write(work / "corpus.jsonl.gz", corpus.build(lists))
    except corpus.CorpusError as error:
        fail(str(error))
    console.print(f"{count:,} documents in {work / 'corpus.jsonl.gz'}")


@app.command("tokenizer")
def tokenizer_command(work: WorkOption = WORK_FOLDER, model: ModelOption = MODEL_FOLDER) -> None:
    """Learn the tokenizer from the training documents."""
    model.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = learn_tokenizer(corpus.read(work / "corpus.jsonl.gz"))
    except corpus.CorpusError as error:
        fail(str(error))
    tokenizer.save(str(model / "tokenizer.json"))
    write_json(model / "tokenizer_config.json", TOKENIZER_CONFIG)
    if model.resolve() != MODEL_FOLDER.resolve():
        shutil.copy(MODEL_FOLDER / "chat_template.jinja", model)
    console.print(f"{tokenizer.get_vocab_size():,} entries in {model / 'tokenizer.json'}")


@app.command("encode")
def encode_command(work: WorkOption = WORK_FOLDER, model: ModelOption = MODEL_FOLDER) -> None:
    """Write the documents as token ids, and the held-out sample beside the model."""
    try:
        documents = list(corpus.read(work / "corpus.jsonl.gz"))
    except corpus.CorpusError as error:
        fail(str(error))
    for split in (corpus.TRAINING, corpus.VALIDATION, corpus.HELD_OUT):
        chosen = [document for document in documents if document.split == split]
        encoded = encode_documents(chosen, model)
        encoded.save(work / f"{split}.npz")
        left_out = len(chosen) - len(encoded.ends)
        console.print(f"{split}: {len(encoded.tokens):,} tokens, {left_out} documents too long")
    held_out = [document for document in documents if document.split == corpus.HELD_OUT]
    write_sample(model / "heldout.jsonl", held_out, model)


@app.command("train")
def train_command(
    work: WorkOption = WORK_FOLDER,
    model: ModelOption = MODEL_FOLDER,
    epochs: Annotated[float, typer.Option(help="Passes over the training text.")] = 18,
    minutes: Annotated[float, typer.Option(help="End the run after this time at the latest.")] = 60,
    row_length: Annotated[int, typer.Option(help="Tokens per row.")] = 1024,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens per optimizer step.")] = 131_072,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 6e-3,
    weight_decay: Annotated[float, typer.Option(help="On matrices.")] = 0.8,
    warmup_steps: Annotated[int, typer.Option(help="Steps to the highest rate.")] = 200,
    evaluations: Annotated[int, typer.Option(help="Looks at the validation loss.")] = 20,
    seed: Annotated[int, typer.Option(help="For the weights and the order.")] = 0,
) -> None:
    """Train, write the checkpoint, and evaluate it on all held-out documents."""
    recipe = Recipe(
        epochs, minutes, row_length, tokens_per_step, learning_rate, weight_decay,
        warmup_steps, evaluations, seed,
    )  # fmt: skip
    splits = {
        name: Encoded.load(work / f"{name}.npz")
        for name in (corpus.TRAINING, corpus.VALIDATION, corpus.HELD_OUT)
    }
    trainer = Trainer(recipe, splits[corpus.TRAINING], splits[corpus.VALIDATION])
    trainer.run()
    size = save_checkpoint(trainer.model, model)
    console.print(f"{size:,} bytes in {model / 'model.safetensors'}")
    evaluation = final_evaluation(trainer, splits)
    write_json(model / "evaluation.json", evaluation)
    console.print(evaluation["overview"])


def final_evaluation(trainer: Trainer, splits: dict[str, Encoded]) -> dict[str, Any]:
    """All figures of a finished run; the model is left with its rounded weights."""
    budget = 65_536 if trainer.device.type == "cuda" else 4_096
    model = trainer.model.eval()
    master = score(model, splits[corpus.HELD_OUT], budget)
    model.to(torch.bfloat16).to(torch.float32)  # in place: what the file can hold
    held_out = score(model, splits[corpus.HELD_OUT], budget)
    watched = {
        "training (4,000 of the documents)": some(splits[corpus.TRAINING], 4_000),
        "validation (chose the checkpoint)": splits[corpus.VALIDATION],
    }
    overview = {name: score(model, part, budget)["overall"] for name, part in watched.items()}
    overview["held out, as saved (bfloat16 weights)"] = held_out["overall"]
    overview["held out, before rounding (float32 weights)"] = master["overall"]
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "overview": {name: value.figures() for name, value in overview.items()},
        "heldout": perplexities(held_out),
        "training": training_record(trainer, len(splits[corpus.TRAINING].tokens)),
    }


def training_record(trainer: Trainer, corpus_tokens: int) -> dict[str, Any]:
    """What was run, on what, for how long, and how the losses went."""
    last = trainer.history[-1]
    return {
        **circumstances(),
        "recipe": asdict(trainer.recipe),
        "compiled": trainer.compiled,
        "seconds": round(trainer.seconds, 1),
        "steps": last["step"],
        "tokens": last["tokens"],
        "corpus_tokens": corpus_tokens,
        "epochs": round(last["tokens"] / corpus_tokens, 2),
        "history": trainer.history,
    }


def some(encoded: Encoded, count: int) -> Encoded:
    """Evenly spaced plain documents out of many."""
    plain = numpy.flatnonzero(encoded.plain)
    chosen = plain[numpy.linspace(0, len(plain) - 1, min(count, len(plain))).astype(int)]
    pieces = [encoded.tokens[encoded.starts[index] : encoded.ends[index]] for index in chosen]
    return Encoded(
        tokens=numpy.concatenate(pieces),
        ends=numpy.cumsum([len(piece) for piece in pieces], dtype=numpy.int64),
        prompts=encoded.prompts[chosen],
        sizes=encoded.sizes[chosen],
        languages=encoded.languages[chosen],
        plain=encoded.plain[chosen],
    )


@app.command("evaluate")
def evaluate_command(
    model: ModelOption = MODEL_FOLDER,
    write: Annotated[bool, typer.Option("--write", help="Note it in evaluation.json.")] = False,
) -> None:
    """Score the shipped held-out sample in float32; runs on a CPU in a few minutes."""
    encoded = encode_documents(read_sample(model), model)
    started = time.perf_counter()
    figures = perplexities(score(load_model(model), encoded, 4_096))
    seconds = time.perf_counter() - started
    table = Table(title=f"held-out sample, {seconds:.0f} s")
    for heading in ("language", "documents", "tokens", "perplexity", "bits per byte"):
        table.add_column(heading, justify="left" if heading == "language" else "right")
    for name, row in figures.items():
        numbers = f"{row['perplexity']:.3f}", f"{row['bits_per_byte']:.4f}"
        table.add_row(name, f"{row['documents']:,}", f"{row['tokens']:,}", *numbers)
    console.print(table)
    if write:
        sample = {**circumstances(), "seconds": round(seconds, 1), "figures": figures}
        write_json(model / "evaluation.json", {**read_evaluation(model), "sample": sample})


@app.command("card")
def card_command(model: ModelOption = MODEL_FOLDER) -> None:
    """Bring the figures and samples in the model card up to date."""
    evaluation = read_evaluation(model)
    if "sample" not in evaluation:
        fail("evaluation.json has no figures of the sample: run `evaluate --write` first")
    path = model / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(replace_figures(card, figures_section(model, evaluation)), encoding="utf-8")


if __name__ == "__main__":
    app()

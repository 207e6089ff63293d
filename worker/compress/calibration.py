"""What a layer's weights are fed: calibration text, and the moments of their inputs.

Text is a .jsonl of {"text": ..., "language": ..., "prompt": ...}, of which the first is needed, or
any other file, whose documents are separated by empty lines. For calibration languages take
turns, so that rare ones count as much as common ones; documents are strung together and cut into
sequences of equal length.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..model.config import ModelConfig
from ..model.layers import DecoderLayer, Experts
from ..text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Text:
    """One document of a file."""

    text: str
    language: str = ""
    prompt: str = ""
    """What comes before the text and is not to be predicted."""


def read_texts(path: Path) -> list[Text]:
    """The documents of a file. Raises ConfigError if it is not readable or has none."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
            found = [
                Text(*(_string(row, key) for key in ("text", "language", "prompt"))) for row in rows
            ]
        else:
            found = [Text(part) for part in content.split("\n\n") if part.strip()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} is no text to read ({type(error).__name__}: {error}); give a .jsonl with a "
            "`text` in each line, or plain text in UTF-8"
        ) from error
    if not found:
        raise ConfigError(f"{path} has no text")
    return found


def _string(row: dict[str, Any], key: str) -> str:
    """What a document has there; all but its text may be missing or null."""
    found = row["text"] if key == "text" else row.get(key) or ""
    if not isinstance(found, str):
        raise TypeError(f"{key!r} is {found!r}")
    return found


def sequences(path: Path, tokenizer: Tokenizer, count: int, length: int, seed: int) -> Tensor:
    """int64 [count, length] of tokens, the same ones for the same seed.

    Raises ConfigError if there is not text enough.
    """
    found: list[int] = []
    for text in _in_turn(read_texts(path), random.Random(seed)):
        found += tokenizer.encode(text.prompt + text.text)
        if len(found) >= count * length:
            return torch.tensor(found[: count * length]).view(count, length)
    raise ConfigError(
        f"{path} has {len(found)} tokens; {count} sequences of {length} need {count * length}. "
        "Give more text, or ask for fewer or shorter sequences"
    )


def all_sequences(path: Path, tokenizer: Tokenizer, length: int, seed: int) -> Tensor:
    """int64 [n, length] of all tokens of a file, its documents in an order that `seed` decides.

    For training, where every document counts the same. Raises ConfigError if it has fewer tokens
    than one sequence.
    """
    texts = read_texts(path)
    random.Random(seed).shuffle(texts)
    documents = [torch.tensor(tokenizer.encode(text.prompt + text.text)) for text in texts]
    tokens = torch.cat(documents).long()
    if len(tokens) < length:
        raise ConfigError(f"{path} has {len(tokens)} tokens, less than one sequence of {length}")
    return tokens[: len(tokens) // length * length].view(-1, length)


def check_ids(tokens: Tensor, *folders: Path) -> None:
    """ConfigError if text has token ids that the model of a checkpoint's folder lacks."""
    most = int(tokens.max())
    for folder in folders:
        vocabulary = ModelConfig.load(folder).vocabulary
        if most >= vocabulary:
            raise ConfigError(
                f"the text has token id {most}, but {folder} knows only ids below {vocabulary}: "
                "it and the tokenizer do not belong together"
            )


def _in_turn(texts: list[Text], draw: random.Random) -> Iterator[Text]:
    """A document of each language in turn, each language in an order of its own."""
    by_language: dict[str, list[Text]] = {}
    for text in texts:
        by_language.setdefault(text.language, []).append(text)
    for own in by_language.values():
        draw.shuffle(own)
    while by_language:
        for language in list(by_language):
            yield by_language[language].pop()
            if not by_language[language]:
                del by_language[language]


class Moments:
    """Sums x^T x over the inputs of a layer's large weights, by their names, while it runs.

    Use it in a `with`. `sums` are float32 [K, K], of experts [E, K, K]; `counts` are the inputs.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._experts: Experts | None = layer.feed_forward.experts
        mlp, attention = layer.feed_forward.mlp, layer.attention
        for name, module in (
            ("attention.qkv.weight", attention.qkv),
            ("attention.out.weight", attention.out),
            ("feed_forward.mlp.gate_up.weight", mlp.gate_up),
            ("feed_forward.mlp.down.weight", mlp.down),
        ):
            self._handles.append(module.register_forward_pre_hook(self._adding(name)))
        if self._experts is not None:
            self._watch(self._experts)

    def __enter__(self) -> "Moments":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        if self._experts is not None:
            del self._experts.run  # what it has of its class shows again

    def _adding(self, name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            if name not in self.sums:
                self.sums[name] = x.new_zeros(x.shape[1], x.shape[1])
                self.counts[name] = torch.zeros((), dtype=torch.int64)
            self.sums[name].addmm_(x.T, x)
            self.counts[name] += len(x)

        return add

    def _watch(self, experts: Experts) -> None:
        plain = experts.run
        names = ("feed_forward.experts.gate_up", "feed_forward.experts.down")
        for name, weight in zip(names, (experts.gate_up, experts.down), strict=True):
            count, _, columns = weight.shape
            self.sums[name] = torch.zeros(count, columns, columns, device=weight.device)
            self.counts[name] = torch.zeros(count, dtype=torch.int64)

        def run(inputs: Tensor, chosen: Tensor) -> Tensor:
            counts = chosen.bincount(minlength=len(experts.gate_up)).tolist()
            for index, own in enumerate(inputs.split(counts)):
                if not len(own):
                    continue
                gate, up = F.linear(own, experts.gate_up[index]).chunk(2, -1)
                inner = F.gelu(gate, approximate="tanh") * up
                for name, x in zip(names, (own.float(), inner.float()), strict=True):
                    self.sums[name][index].addmm_(x.T, x)
                    self.counts[name][index] += len(x)
            return plain(inputs, chosen)

        experts.run = run  # type: ignore[method-assign]


class Shares:
    """How much a layer's two branches add to the residual, as shares of its energy, while it runs.

    Each branch ends in a norm, which makes up for its size: an error in it counts for the model by
    what the norm lets through.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        self._energy = {"attention": 0.0, "feed_forward": 0.0, "": 0.0}
        parts: dict[str, tuple[nn.Module, nn.Module]] = {
            "attention": (layer.attention, layer.attention_output_norm),
            "feed_forward": (layer.feed_forward, layer.feed_forward_output_norm),
            "": (layer, nn.Identity()),
        }
        self._handles = [
            module.register_forward_hook(self._adding(name, after))
            for name, (module, after) in parts.items()
        ]

    def __enter__(self) -> "Shares":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def of(self, weight: str) -> float:
        """The share of the branch that a weight, such as `attention.qkv.weight`, is in."""
        return self._energy[weight.partition(".")[0]] / self._energy[""]

    def _adding(self, name: str, after: nn.Module) -> Any:
        # Not a hook of the norm: where kernels join a branch to the residual, no norm is called.
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._energy[name] += float(after(output).float().square().sum())

        return add

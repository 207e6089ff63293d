"""Scores: how well a model predicts descriptions, per token and per byte, by language.

Given up: stitching of long documents (none is longer than the model's positions), and documents in
the chat format, which are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from torch.nn import functional

from .architecture import PAD
from .encoding import Encoded
from .prompts import LANGUAGES


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


def score(model: torch.nn.Module, encoded: Encoded, budget: int) -> dict[str, Score]:
    """Scores of the plain documents by language, and of all under "overall", in the model's dtype.

    Counted: every token of the description and the end token, given `<bos>` and the prompt.
    """
    scores: dict[str, Score] = {"overall": Score()}
    for document, losses in document_losses(model, encoded, budget):
        size = int(encoded.sizes[document])
        for name in ("overall", LANGUAGES[encoded.languages[document]]):
            scores.setdefault(name, Score()).add(len(losses), size, float(losses.sum()))
    return scores


@torch.inference_mode()
def document_losses(
    model: torch.nn.Module, encoded: Encoded, budget: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each plain document's index with the losses of its counted tokens, in no particular order."""
    device = next(model.parameters()).device
    chosen = numpy.flatnonzero(encoded.plain)
    starts, ends = encoded.starts[chosen], encoded.ends[chosen]
    for batch in batches((ends - starts).tolist(), budget):
        pieces = [torch.from_numpy(encoded.tokens[starts[i] : ends[i]].astype(int)) for i in batch]
        ids = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=PAD)
        losses = token_losses(model, ids.to(device)).cpu()
        for row, document in enumerate(chosen[batch]):
            first = int(encoded.prompts[document]) - 1
            yield int(document), losses[row, first : len(pieces[row]) - 1].double()


def token_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of every token but the first; padding stands on the right."""
    logits: torch.Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    targets = ids[:, 1:].flatten()
    losses = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    by_document: torch.Tensor = losses.view(ids.shape[0], -1)
    return by_document


def perplexities(scores: dict[str, Score]) -> dict[str, dict[str, float]]:
    """The figures of every language in the corpus's order, after the overall ones."""
    names = ["overall", *(name for name in LANGUAGES if name in scores)]
    return {name: scores[name].figures() for name in names}

"""What compression did to a model's predictions, per language.

Both models read the same documents; each predicts every token from those before it. Perplexity is
exp(mean negative log-likelihood), divergence KL(original || compressed) in nats a token, agreement
how often both find the same token likeliest. Intervals are 95 % of a paired bootstrap over whole
documents, whose tokens are not independent of each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ...model.config import ModelConfig
from ...model.decoder import Attention, Decoder, DenseAttention

RESAMPLES = 1000
LEAST_TOKENS = 2000
"""A language with fewer is told, but not flagged: it would be noise."""
_ROWS = 256
"""Positions whose logits are there at once."""


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, of which those from `start` on are predicted."""

    language: str
    ids: tuple[int, ...]
    start: int = 1


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over the predicted tokens of one document."""

    language: str
    tokens: int
    original: float
    """Negative log-likelihood by the original, nats."""
    compressed: float
    divergence: float
    agreed: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one language, or of all."""

    language: str
    documents: int
    tokens: int
    original_perplexity: float
    perplexity: float
    ratio: float
    """compressed / original perplexity"""
    ratio_low: float
    ratio_high: float
    divergence: float
    divergence_low: float
    divergence_high: float
    agreement: float
    out_of_line: bool
    """Its ratio is worse than that of all, by more than chance explains."""


def score(
    original: Decoder,
    compressed: Decoder,
    documents: Sequence[Document],
    told: Callable[[int, int], None] = lambda done, documents: None,
) -> list[Scores]:
    """Both models on each document. Raises ConfigError as `check_documents` does."""
    check_documents(documents, original.config, compressed.config)
    found = []
    with torch.inference_mode():
        for number, document in enumerate(documents, start=1):
            pair = [(each, hidden_states(each, document)) for each in (original, compressed)]
            found.append(compare(document, pair))
            told(number, len(documents))
    return found


def check_documents(documents: Sequence[Document], *models: ModelConfig) -> None:
    """ConfigError that names a document with nothing to predict, or with ids that a model lacks."""
    vocabulary = min(model.vocabulary for model in models)
    for number, document in enumerate(documents, start=1):
        if len(document.ids) <= max(1, document.start):
            raise ConfigError(f"document {number} has no token to predict; leave it out")
        if max(document.ids) >= vocabulary:
            raise ConfigError(
                f"document {number} has token id {max(document.ids)}, but the model knows only ids "
                f"below {vocabulary}: it and the tokenizer do not belong together"
            )


def compare(document: Document, pair: Sequence[tuple[Decoder, Tensor]]) -> Scores:
    """What two models, or one run in two ways, predict: each a decoder and its `hidden_states`."""
    (original, _), (compressed, _) = pair
    ids = torch.tensor(document.ids, device=original.embedding.weight.device)
    start = max(1, document.start)
    sums = torch.zeros(4, dtype=torch.float64)
    for targets, *rows in zip(
        ids[start:].split(_ROWS),
        *(own[start - 1 : -1].split(_ROWS) for _, own in pair),
        strict=True,
    ):
        theirs, ours = (
            decoder.logits(own).double().log_softmax(-1)
            for decoder, own in zip((original, compressed), rows, strict=True)
        )
        picked = targets[:, None]
        sums += torch.stack(
            [
                -theirs.gather(1, picked).sum(),
                -ours.gather(1, picked).sum(),
                (theirs.exp() * (theirs - ours)).sum(),
                (theirs.argmax(-1) == ours.argmax(-1)).sum().double(),
            ]
        ).cpu()
    original_loss, loss, divergence, agreed = sums.tolist()
    return Scores(document.language, len(ids) - start, original_loss, loss, divergence, int(agreed))


def hidden_states(
    decoder: Decoder, document: Document, attention: Attention | None = None
) -> Tensor:
    """[T, hidden] of all its tokens, with dense attention unless another is given."""
    ids = torch.tensor(document.ids, device=decoder.embedding.weight.device)
    if attention is None:
        attention = DenseAttention(decoder.config, [len(ids)])
    hidden: Tensor = decoder(ids, torch.arange(len(ids), device=ids.device), attention)
    return hidden


def summarize(scores: Sequence[Scores], seed: int = 0) -> list[Summary]:
    """All documents together, then each language, the worst ratio first."""
    overall = _summary("all", scores, None, seed)
    languages = sorted({each.language for each in scores})
    if len(languages) < 2:
        return [overall]
    found = [
        _summary(name, [each for each in scores if each.language == name], overall, seed)
        for name in languages
    ]
    return [overall, *sorted(found, key=lambda each: -each.ratio)]


def _summary(
    language: str, scores: Sequence[Scores], overall: Summary | None, seed: int
) -> Summary:
    table = np.array([(s.tokens, s.original, s.compressed, s.divergence, s.agreed) for s in scores])
    draw = np.random.default_rng(seed)
    picks = draw.integers(len(scores), size=(RESAMPLES, len(scores)))
    resampled = table[picks].sum(1)
    tokens, original, compressed, divergence, agreed = table.sum(0)
    ratios = np.exp((resampled[:, 2] - resampled[:, 1]) / resampled[:, 0])
    low, high = np.quantile(ratios, (0.025, 0.975))
    spread = np.quantile(resampled[:, 3] / resampled[:, 0], (0.025, 0.975))
    out = overall is not None and tokens >= LEAST_TOKENS and low > overall.ratio_high
    return Summary(
        language=language,
        documents=len(scores),
        tokens=int(tokens),
        original_perplexity=float(np.exp(original / tokens)),
        perplexity=float(np.exp(compressed / tokens)),
        ratio=float(np.exp((compressed - original) / tokens)),
        ratio_low=float(low),
        ratio_high=float(high),
        divergence=float(divergence / tokens),
        divergence_low=float(spread[0]),
        divergence_high=float(spread[1]),
        agreement=float(agreed / tokens),
        out_of_line=bool(out),
    )

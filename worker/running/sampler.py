"""From logits to tokens: bias, penalties, cuts, one draw a token, log-probabilities.

The order is transformers': bias and penalties, temperature, top-k, top-p, min-p. A draw takes one
uniform number made from the sequence's seed and the token's position in the answer (SplitMix64,
Steele et al., OOPSLA 2014) and inverts the cumulative distribution with it. So a draw needs no
state: it comes out the same in any batch, after a preemption, and when another worker resumes.
What it gives up: top-p and min-p without top-k sort the whole vocabulary.
"""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..draws import uniform
from ..scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Choice:
    """A token with its log-probability under the model's own distribution, if asked for."""

    token: int
    logprob: float | None = None
    rank: int | None = None
    candidates: tuple[tuple[int, float], ...] = ()


def sample(
    logits: Tensor, sequences: Items[Sequence], forbidden: Items[Items[int]]
) -> list[Choice | None]:
    """Choose one token a sequence; None where the row holds NaN, which no rule can repair.

    Args:
        logits: [sequences, vocabulary], float32; not changed.
        sequences: whose next token each row gives.
        forbidden: for each row the token ids that must not be chosen.
    """
    adjusted = _adjust(logits, sequences, forbidden)
    maxima, likeliest = adjusted.max(dim=-1)
    tokens: list[int] = likeliest.tolist()
    sound = [not math.isnan(maximum) for maximum in maxima.tolist()]
    drawn = [r for r, sequence in enumerate(sequences) if sound[r] and not sequence.sampling.greedy]
    if drawn:
        rows = adjusted if len(drawn) == len(sequences) else adjusted[drawn]
        for row, token in zip(drawn, _draw(rows, [sequences[r] for r in drawn]), strict=True):
            tokens[row] = token
    choices = [Choice(t) if fine else None for t, fine in zip(tokens, sound, strict=True)]
    wanted = [r for r, s in enumerate(sequences) if sound[r] and s.sampling.logprobs is not None]
    if wanted:
        counts = [sequences[row].sampling.logprobs or 0 for row in wanted]
        scored = score(logits[wanted], [tokens[row] for row in wanted], counts)
        for row, choice in zip(wanted, scored, strict=True):
            choices[row] = choice
    return choices


def score(logits: Tensor, tokens: Items[int], candidates: Items[int]) -> list[Choice]:
    """Log-probabilities of given tokens.

    Args:
        logits: [rows, vocabulary], float32.
        tokens: the token of each row.
        candidates: how many of the likeliest tokens to return for each row.
    """
    logprobs = logits.log_softmax(dim=-1)
    index = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    chosen = logprobs.gather(1, index)
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    most = min(max(candidates), logits.shape[-1])
    values, ids = (part.tolist() for part in logprobs.topk(most, dim=-1))
    return [
        Choice(token, logprob, rank, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, logprob, rank, row_ids, row_values, count in zip(
            tokens, chosen.squeeze(1).tolist(), ranks.tolist(), ids, values, candidates, strict=True
        )
    ]


def likeliest(logits: Tensor, counts: Items[int]) -> list[tuple[list[int], list[float]] | None]:
    """The likeliest tokens and their log-probabilities, in descending order; None for NaN.

    Args:
        logits: [rows, vocabulary], float32.
        counts: how many each row tells; only as much as that leaves the device.
    """
    logprobs = logits.log_softmax(dim=-1)
    told: list[tuple[list[int], list[float]] | None] = [None] * len(counts)
    for count in set(counts):
        rows = [row for row, own in enumerate(counts) if own == count]
        chosen = logprobs if len(rows) == len(counts) else logprobs[rows]
        values, ids = (part.tolist() for part in chosen.topk(max(count, 1), dim=-1))
        for row, row_ids, row_values in zip(rows, ids, values, strict=True):
            if not math.isnan(row_values[0]):
                told[row] = (row_ids[:count], row_values[:count])
    return told


def _adjust(logits: Tensor, sequences: Items[Sequence], forbidden: Items[Items[int]]) -> Tensor:
    """Logits after bias, penalties and bans; the same tensor if no row has any."""
    changed = any(s.sampling.logit_bias or s.sampling.penalised for s in sequences)
    if not changed and not any(forbidden):
        return logits
    adjusted = logits.clone()
    for row, sequence in enumerate(sequences):
        sampling = sequence.sampling
        if sampling.penalised:
            _penalise(adjusted[row], sequence)
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
            bias = torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
            adjusted[row, ids] += bias
    _ban(adjusted, [tuple(banned) for banned in forbidden])
    return adjusted


def _ban(logits: Tensor, forbidden: Items[tuple[int, ...]]) -> None:
    """Leave no chance to the tokens that are forbidden for each row, in place."""
    for banned in set(forbidden) - {()}:
        ids = _on_device(banned, logits.device)
        if all(own == banned for own in forbidden):
            logits.index_fill_(1, ids, -torch.inf)
            continue
        for row, own in enumerate(forbidden):
            if own == banned:
                logits[row].index_fill_(0, ids, -torch.inf)


@lru_cache(maxsize=256)
def _on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept there: they hardly ever change, and to bring them waits for all that is under way."""
    with torch.inference_mode(False):
        return torch.tensor(ids, device=device)


def _penalise(logits: Tensor, sequence: Sequence) -> None:
    """Apply the three penalties to one row, in place."""
    sampling = sequence.sampling
    if sampling.repetition_penalty != 1:  # Keskar et al. 2019, section 4.1
        seen = torch.tensor(sorted(set(sequence.tokens)), device=logits.device)
        values = logits[seen]
        scaled = values * torch.where(
            values > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty
        )
        logits[seen] = scaled
    if sequence.counts and (sampling.presence_penalty or sampling.frequency_penalty):
        ids = torch.tensor(list(sequence.counts), device=logits.device)
        counts = torch.tensor(list(sequence.counts.values()), device=logits.device)
        logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _draw(logits: Tensor, sequences: Items[Sequence]) -> list[int]:
    """One draw a row from the cut and renormalised distributions."""
    device, vocabulary = logits.device, logits.shape[-1]
    column = [[s.sampling.temperature, s.sampling.top_p, s.sampling.min_p] for s in sequences]
    temperature, top_p, min_p = torch.tensor(column, device=device).T.unsqueeze(-1)
    keep = [s.sampling.top_k or vocabulary for s in sequences]
    values, ids = logits.topk(min(max(keep), vocabulary), dim=-1)
    # Shifted by the maximum first: a tiny temperature then gives -inf, never inf or NaN.
    scaled = (values - values[:, :1]) / temperature.clamp_min(1e-6)
    if min(keep) < values.shape[-1]:
        limit = torch.tensor(keep, device=device).unsqueeze(1)
        order = torch.arange(values.shape[-1], device=device)
        scaled = scaled.masked_fill(order >= limit, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    # A token stays if those before it have not yet reached top_p; the first always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = ((before < top_p) | (top_p >= 1)) & (probabilities >= min_p * probabilities[:, :1])
    return _invert(probabilities.masked_fill(~kept, 0), ids, sequences)


def _invert(weights: Tensor, ids: Tensor, sequences: Items[Sequence]) -> list[int]:
    """Draw from unnormalised weights, sorted from the largest, by inverting their running sum."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    numbers = [uniform(s.seed, s.answer_length) for s in sequences]
    threshold = torch.tensor(numbers, dtype=torch.float64, device=weights.device).unsqueeze(1)
    picked = torch.searchsorted(cumulative, threshold * cumulative[:, -1:], right=True)
    last = (weights > 0).sum(dim=-1, keepdim=True) - 1  # rounding may point past the last one
    tokens: list[int] = ids.gather(1, torch.minimum(picked, last)).squeeze(1).tolist()
    return tokens

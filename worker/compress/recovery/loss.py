"""How far the student's predictions are from what is taught, and from the text.

Taught is the mean of the teachers' probabilities. Several that were trained apart know more than
each, where there is little text above all: a student of all of them can be better than the model
that it was made of (Kim et al., "Pre-training under infinite compute", arXiv:2509.14786).

A vocabulary of 262,144 takes 1 GB for the logits of a thousand rows, several times over. Where it
is as large, they are there for a few rows at a time, and made again for the gradient.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...model.decoder import Decoder, DenseAttention

_WHOLE, _PART = 1 << 29, 1 << 25
"""So many logits of each model are kept for the gradient, some 2 GB in float32; of more there is a
part at a time."""


def losses(
    student: Decoder,
    teachers: Sequence[Decoder],
    tokens: Tensor,
    theirs: Sequence[Tensor],
    real: Tensor,
) -> Tensor:
    """Means over the tokens that are predicted, float32 [2].

    KL(teachers || student) in nats, which has a gradient for the student, and so has the second,
    its negative log-likelihood of the text, of `real` rows alone. `tokens` is int64 [B, L]: L - 1
    are predicted in each row. `theirs` are what `hidden_states` has of each teacher for them.
    `real` is bool [B].
    """
    ours = hidden_states(student, tokens)
    targets = tokens[:, 1:].flatten()
    counts = real[:, None].expand(-1, tokens.shape[1] - 1).flatten()
    vocabulary = student.config.vocab_size
    seen = counts.sum().clamp(min=1)
    each = torch.stack((torch.full_like(seen, len(counts)), seen))
    if len(targets) * vocabulary <= _WHOLE:
        return _sums(student, teachers, ours, targets, counts, *theirs) / each
    rows = max(1, _PART // vocabulary)
    total = torch.zeros(2, device=tokens.device)
    for part in zip(
        ours.split(rows),
        targets.split(rows),
        counts.split(rows),
        *(states.split(rows) for states in theirs),
        strict=True,
    ):
        total = total + checkpoint(_sums, student, teachers, *part, use_reentrant=False)
    return total / each


def hidden_states(decoder: Decoder, tokens: Tensor) -> Tensor:
    """The final ones that predict something, [B * (L - 1), hidden], of int64 [B, L]."""
    count, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).repeat(count)
    attention = DenseAttention(decoder.config, [length] * count)
    hidden: Tensor = decoder(tokens.flatten(), positions, attention)
    predicting: Tensor = hidden.unflatten(0, (count, length))[:, :-1]
    return predicting.flatten(0, 1)


def _sums(
    student: Decoder,
    teachers: Sequence[Decoder],
    ours: Tensor,
    targets: Tensor,
    counts: Tensor,
    *theirs: Tensor,
) -> Tensor:
    with torch.no_grad():
        wanted = _taught(teachers, theirs)
    found = student.logits(ours).float().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found)).sum()
    likelihood = found.gather(1, targets[:, None])[:, 0]
    return torch.stack((divergence, -torch.where(counts, likelihood, 0.0).sum()))


def _taught(teachers: Sequence[Decoder], theirs: Sequence[Tensor]) -> Tensor:
    """Logarithms of the mean of their probabilities, float32 [N, vocab]."""
    mean: Tensor | None = None
    for teacher, states in zip(teachers, theirs, strict=True):
        own = teacher.logits(states).float().log_softmax(-1)
        mean = own if mean is None else torch.logaddexp(mean, own)
    assert mean is not None
    return mean - math.log(len(teachers))

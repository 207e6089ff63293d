"""How far the student's predictions are from the teacher's, and from the text.

Logits of a few rows at a time, made again for the gradient: a vocabulary of 262,144 would take 1 GB
for a thousand rows, several times over.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...model.decoder import Decoder, DenseAttention

_ROW_NUMBERS = 1 << 25
"""Logits that are there at once, of each of the two models."""


def losses(student: Decoder, teacher: Decoder, tokens: Tensor) -> Tensor:
    """Means over the tokens that are predicted, float32 [2].

    KL(teacher || student) in nats, which has a gradient for the student, and so has the second, its
    negative log-likelihood of the text. `tokens` is int64 [B, L]: L - 1 are predicted in each row.
    """
    with torch.no_grad():
        theirs = _hidden(teacher, tokens)
    ours = _hidden(student, tokens)
    targets = tokens[:, 1:].flatten()
    rows = max(1, _ROW_NUMBERS // student.config.vocab_size)
    total = torch.zeros(2, device=tokens.device)
    for part in zip(ours.split(rows), theirs.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(_sums, student, teacher, *part, use_reentrant=False)
    return total / len(targets)


def _hidden(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Hidden states that predict something, [B * (L - 1), hidden]."""
    count, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).repeat(count)
    attention = DenseAttention(decoder.config, [length] * count)
    hidden: Tensor = decoder(tokens.flatten(), positions, attention)
    predicting: Tensor = hidden.unflatten(0, (count, length))[:, :-1]
    return predicting.flatten(0, 1)


def _sums(
    student: Decoder, teacher: Decoder, ours: Tensor, theirs: Tensor, targets: Tensor
) -> Tensor:
    with torch.no_grad():
        wanted = teacher.logits(theirs).float().log_softmax(-1)
    found = student.logits(ours).float().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found)).sum()
    return torch.stack((divergence, -found.gather(1, targets[:, None]).sum()))

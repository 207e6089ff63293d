"""Mixtures: how well several models predict together, by the mean of their probabilities.

Teacher-forced on the held-out sample. Given up: weights other than equal ones.
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import torch

from .checkpoint import load_model
from .encoding import Encoded
from .scoring import document_losses

BUDGETS = {"cuda": 65_536, "cpu": 4_096}
"""Tokens in a batch."""


def mixture_perplexities(folders: list[Path], encoded: Encoded) -> dict[str, float]:
    """Perplexity of each model, and of the mean of each group of them, over all documents."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = BUDGETS[device.type]
    losses = {}
    for folder in folders:
        by_document = dict(document_losses(load_model(folder).to(device), encoded, budget))
        losses[folder.name] = torch.cat([by_document[index] for index in sorted(by_document)])
    found = {}
    for size in range(1, len(losses) + 1):
        for names in combinations(losses, size):
            chances = torch.stack([-losses[name] for name in names])
            together = chances.logsumexp(0) - math.log(size)
            found[" + ".join(names)] = math.exp(-float(together.mean()))
    return found

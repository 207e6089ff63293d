"""Experts for training: every expert runs on every token, and unchosen ones count for nothing.

All experts together are then one wide MLP between two matrix products, which compiles without a
branch. Given up: saving their arithmetic, which at this size costs more to organise than to do.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EVERY_EXPERT = "every_expert"


def every_expert(
    experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The chosen experts' weighted sum: `hidden` [T, hidden], the others [T, active]."""
    count = experts.num_experts
    shares = weights.new_zeros(len(weights), count).scatter(1, chosen, weights)
    projected = hidden @ experts.gate_up_proj.flatten(0, 1).T
    gate, up = projected.unflatten(-1, (count, -1)).chunk(2, -1)
    inner = experts.act_fn(gate) * up * shares[..., None].to(up.dtype)
    mixed: torch.Tensor = inner.flatten(1) @ experts.down_proj.transpose(1, 2).flatten(0, 1)
    return mixed.to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(EVERY_EXPERT, every_expert)

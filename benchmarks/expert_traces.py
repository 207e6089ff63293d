"""Which experts a router chooses, token after token: drawn with stated locality, or a real model's.

Drawn: each layer has a popularity of its own, (rank + 5)^-2, and each expert of a token is one of
the next token's with a probability of 0.25. With that LRU finds 75.7, 89.8 and 96.3 % of the
choices where 19, 38 and 63 % of the experts of 30 layers are in slots; published of Qwen3-30B,
which takes 8 of 128 too, are 74.1, 89.4 and 96.2 (imp#1374). The published 36.6 % with 6 % in
slots are not met: so few are less than one token takes, and LRU over all layers finds nothing.
What it gave up: popularity that changes with the text, and layers that choose alike.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conclave.worker.compress.quality.reading import load_unpacked
from conclave.worker.memory.experts.replay import at_best, by_age, by_policy
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import DenseAttention
from conclave.worker.model.layers import Experts
from conclave.worker.text.tokenizer import Tokenizer

MODELS = Path(__file__).parents[1] / "examples" / "models"
STEEP, FLAT, STAYS = 2.0, 5, 0.25
"""Of the popularity, the exponent and the ranks that are nearly alike; and the persistence."""
Row = dict[str, Any]


def drawn(
    steps: int, layers: int, experts: int, active: int, sequences: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """int64 [steps, layers, sequences, active] chosen, and as many that came next in the draw."""
    draw = torch.Generator().manual_seed(seed)
    ranks = torch.rand(layers, 1, experts, generator=draw).argsort(-1).argsort(-1)
    popular = -STEEP * torch.log(ranks + 1.0 + FLAT)
    best = torch.empty(steps, layers, sequences, 2 * active, dtype=torch.int64)
    for step in range(steps):
        noise = torch.rand(layers, sequences, experts, generator=draw).clamp_(1e-9, 1 - 1e-7)
        keys = popular - torch.log(-torch.log(noise))  # Gumbel: the best are a draw without return
        if step:
            stays = torch.rand(layers, sequences, active, generator=draw) < STAYS
            kept = torch.where(stays, 1e3, 0.0)
            keys = keys.scatter_add(-1, best[step - 1, ..., :active], kept)
        best[step] = keys.topk(2 * active, -1).indices
    return best[..., :active].contiguous(), best[..., active:].contiguous()


def foreseen(chosen: Tensor, following: Tensor, right: float, seed: int = 1) -> Tensor:
    """Guesses at choices, each wrong with a probability of 1 - `right`.

    Then it is one that came next in the draw, as a router's near misses are.
    """
    draw = torch.Generator().manual_seed(seed)
    wrong = torch.rand(chosen.shape, generator=draw) >= right
    return torch.where(wrong, following, chosen)


def rates(trace: Tensor, experts: int, slots: int, warm: int, guessed: Tensor | None = None) -> Row:
    """Hit rates of the policy, of LRU and at best, and the policy's regret in points.

    With guesses also what fetching ahead by them brings.
    """
    flat = trace.flatten(2)
    found = {
        "policy": by_policy(flat, experts, slots, warm).rate,
        "lru": by_age(flat, experts, slots, warm).rate,
        "belady": at_best(flat, experts, slots, warm).rate,
    }
    found["regret_points"] = 100 * (found["belady"] - found["policy"])
    if guessed is not None:
        ahead = by_policy(flat, experts, slots, warm, foreseen=guessed.flatten(2))
        precision = ahead.foreseen_used / max(1, ahead.foreseen)
        found |= {"foreseen": ahead.rate, "foreseen_precision": precision}
    return found


def shipped(texts: int, most: int) -> list[Row]:
    """Of the shipped model with experts, reading held-out text a token at a time."""
    folder = MODELS / "debian-moe-8m"
    config = ModelConfig.load(folder)
    kind = config.layers[0].experts
    assert kind is not None
    trace = read(folder, config, texts)[:most]
    layers = trace.shape[1]
    every = layers * kind.count
    return [
        {"tokens": len(trace), "slots": slots, "share": slots / every}
        | rates(trace[:, :, None], kind.count, slots, len(trace) // 5)
        for slots in (kind.count, round(0.38 * every), round(0.63 * every))
    ]


@torch.inference_mode()
def read(folder: Path, config: ModelConfig, texts: int) -> Tensor:
    """int64 [tokens, layers, active]: what the model at `folder` chooses."""
    tokenizer = Tokenizer(folder)
    decoder = load_unpacked(folder, torch.device("cpu"))
    seen: list[list[Tensor]] = [[] for _ in config.layers]
    own = [module for module in decoder.modules() if isinstance(module, Experts)]
    for module, chosen in zip(own, seen, strict=True):
        module.router.register_forward_hook(
            lambda _, __, scores, chosen=chosen: chosen.append(scores.topk(own[0].active).indices)
        )
    lines = (MODELS / "debian-8m-dense" / "heldout.jsonl").read_text().splitlines()
    for line in lines[:: max(1, len(lines) // texts)][:texts]:
        record = json.loads(line)
        ids = torch.tensor(tokenizer.encode(record["prompt"] + record["text"]))
        decoder(ids, torch.arange(len(ids)), DenseAttention(config, [len(ids)]))
    return torch.stack([torch.cat(chosen) for chosen in seen], 1)

"""How many programs and warps a kernel gets: measured for the cards in `tuned.json`, else by rule.

The rule was found on an H100: what is fastest there has all its programs at work at once, about 27
warps to a processor for one token, and four steps for each. Tables are made by
`python -m benchmarks.tune_kernels`.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .workspace import COUNTERS, PARTIALS

TABLE = Path(__file__).parent / "tuned.json"
_USUAL_PROCESSORS = 64
_WARPS_EACH = {1: 27, 2: 18, 4: 15}


@lru_cache
def _table() -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = json.loads(TABLE.read_text())
    return found


@lru_cache
def _card(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "", 2
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


@lru_cache(maxsize=4096)
def gemv_plan(
    device: torch.device, tiles: int, pieces: int, tokens: int, copies: int
) -> tuple[int, int]:
    """(warps, splits) of a program for `tiles` tiles of 128 rows and `pieces` steps along K."""
    name, processors = _card(device)
    tuned = _table().get(name, {}).get(f"gemv {tokens} {tiles}x{pieces}x{copies}")
    if tuned is not None:
        return tuned[0], tuned[1]
    return gemv_rule(processors, tiles, pieces, tokens, copies)


def gemv_rule(
    processors: int, tiles: int, pieces: int, tokens: int, copies: int
) -> tuple[int, int]:
    """The plan for a card that nobody has measured."""
    wanted = max(1, round(_WARPS_EACH[tokens] * processors / (tiles * copies)))
    rounds = -(-pieces // min(wanted, pieces))
    each = -(-pieces // rounds)
    warps = 1 if each <= 24 else 4
    splits = -(-each // warps)
    room = PARTIALS // (tiles * 128 * tokens * copies)
    return warps, max(1, min(splits, room)) if tiles * copies <= COUNTERS else 1


@lru_cache(maxsize=4096)
def matmul_splits(device: torch.device, tiles: int, chunks: int, blocks: int, tokens: int) -> int:
    """Programs that share a tile's `chunks` scale groups; `blocks` of `tokens` tokens."""
    name, processors = _card(device)
    tuned = _table().get(name, {}).get(f"matmul {tokens} {tiles}x{chunks}x{blocks}")
    return tuned[0] if tuned is not None else matmul_rule(processors, tiles, chunks, blocks, tokens)


def matmul_rule(processors: int, tiles: int, chunks: int, blocks: int, tokens: int) -> int:
    """As many as keep a processor busy with four programs; with big ones at work it takes fewer."""
    programs = (4.0 if tokens <= 64 else 1.3) * processors
    room = PARTIALS // (tiles * 128 * tokens * blocks)
    if tiles * blocks > COUNTERS:
        return 1
    return max(1, min(round(programs / (tiles * blocks)), chunks, room))


def tuned_entries() -> dict[str, dict[str, list[int]]]:
    """The whole table, by card and by key; for those who make it."""
    return dict(_table())


def write_table(entries: dict[str, Any]) -> None:
    """Replace the table."""
    lines = json.dumps(entries, indent=1, sort_keys=True)
    TABLE.write_text(lines + "\n")
    _table.cache_clear()
    gemv_plan.cache_clear()
    matmul_splits.cache_clear()

"""How many programs and warps a kernel gets: measured for the cards in `tuned.json`, else by rule.

The rules were found on an H100 and an H200. Few tokens: what counts is that each program has just
enough steps to hide the first one's wait, so that all its loads are under way at once; how many
programs there are matters little. Tensor cores: what counts is that nearly all places for programs
are taken as long as the kernel runs. Tables are made by `python -m benchmarks.tune_kernels`.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .workspace import COUNTERS, PARTIALS

TABLE = Path(__file__).parent / "tuned.json"
_FULL = 0.8
"""Share of the places for programs that must be taken."""

MOST_AHEAD = 20_000
"""Tiles times steps up to which weights are fetched ahead."""


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
) -> tuple[int, int, int]:
    """(warps, splits, steps fetched ahead) for `tiles` of 128 rows and `pieces` steps along K."""
    tuned = _table().get(_card(device)[0], {}).get(f"gemv {tokens} {tiles}x{pieces}x{copies}")
    if tuned is not None:
        return tuned[0], tuned[1], tuned[2]
    return gemv_rule(tiles, pieces, tokens, copies)


def gemv_rule(tiles: int, pieces: int, tokens: int, copies: int) -> tuple[int, int, int]:
    """The plan for what nobody has measured: four to six steps a warp.

    Long rows need several warps, whose sums meet in the program. Fetching ahead pays while nearly
    all programs run at once, for a weight of up to some 50 MB.
    """
    long = pieces > 128
    if tokens == 4:
        warps, steps, ahead = 1, 6, 0
    elif tokens == 2:
        warps, steps, ahead = (4, 6, 2) if long else (1, 4, 0)
    else:
        warps, steps, ahead = (4, 6, 2) if long else (2, 6, 2)
    splits = _within(-(-pieces // (warps * steps)), tiles, tokens, copies)
    return warps, splits, ahead if copies == 1 and tiles * pieces <= MOST_AHEAD else 0


@lru_cache(maxsize=4096)
def dense_plan(
    device: torch.device, bits: int, tiles: int, pieces: int, tokens: int, copies: int
) -> tuple[int, int]:
    """As `gemv_plan` for a dense weight, whose steps are 4 KiB of codes."""
    key = f"dense{bits} gemv {tokens} {tiles}x{pieces}x{copies}"
    tuned = _table().get(_card(device)[0], {}).get(key)
    return (tuned[0], tuned[1]) if tuned is not None else dense_rule(tiles, pieces, tokens, copies)


def dense_rule(tiles: int, pieces: int, tokens: int, copies: int) -> tuple[int, int]:
    """The plan for what nobody has measured: some hundred programs, six or seven steps a warp."""
    if tokens == 4:
        return 1, _within(-(-pieces // 6), tiles, tokens, copies)
    splits = max(-(-pieces // 28), -(-450 // (tiles * copies)))
    return 4, _within(min(splits, -(-pieces // 8)), tiles, tokens, copies)


def _within(splits: int, tiles: int, tokens: int, copies: int) -> int:
    """As many of the splits as the workspace has room for."""
    room = PARTIALS // (tiles * 128 * tokens * copies)
    return max(1, min(splits, room)) if tiles * copies <= COUNTERS else 1


@lru_cache(maxsize=4096)
def matmul_splits(
    device: torch.device, tiles: int, chunks: int, blocks: int, tokens: int, each: int
) -> int:
    """Programs that share a tile's `chunks` scale groups; `blocks` of `tokens` tokens.

    A processor has `each` programs at a time.
    """
    name, processors = _card(device)
    tuned = _table().get(name, {}).get(f"matmul {tokens} {tiles}x{chunks}x{blocks}x{each}")
    if tuned is not None:
        return tuned[0]
    return matmul_rule(processors, tiles, chunks, blocks, tokens, each)


def matmul_rule(
    processors: int, tiles: int, chunks: int, blocks: int, tokens: int, each: int
) -> int:
    """The splits for what nobody has measured: as many programs as run at once, or twice that.

    A few programs more than run at once take half as long again. So it is twice as many if those
    that run at once would leave more than a fifth of their places empty. Each has seven groups at
    least; three, as long as there are processors without a program. All have as many, and there
    is room for their sums.
    """
    programs = tiles * blocks
    if programs > COUNTERS:
        return 1
    most = max(chunks // 7, min(-(-chunks // 3), processors // programs))
    most = min(most, PARTIALS // (programs * 128 * tokens))
    places = each * processors
    splits = min(most, places // programs)
    if splits * programs < _FULL * places:
        splits = min(most, 2 * places // programs)
    return -(-chunks // -(-chunks // max(1, splits)))


def persistent_programs(
    device: torch.device, tiles: int, chunks: int, blocks: int, tokens: int, each: int = 1
) -> int:
    """Programs that share all tiles, for each of the `blocks` of `tokens` tokens: as many as run.

    A processor has `each` at a time.

    No more than there are scale groups, or than there is room for two partial tiles of each.
    """
    room = PARTIALS // (2 * 128 * tokens)
    return max(1, min(min(each * _card(device)[1], room) // blocks, tiles * chunks))


def tuned_entries() -> dict[str, dict[str, list[int]]]:
    """The whole table, by card and by key; for those who make it."""
    return dict(_table())


def write_table(entries: dict[str, Any]) -> None:
    """Replace the table."""
    lines = json.dumps(entries, indent=1, sort_keys=True)
    TABLE.write_text(lines + "\n")
    _table.cache_clear()
    gemv_plan.cache_clear()
    dense_plan.cache_clear()
    matmul_splits.cache_clear()

"""Questions that kernels put to `conclave.kernels.tuning`, and the answers worth trying."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

from conclave.kernels import tuning
from conclave.kernels.workspace import COUNTERS, PARTIALS

Plan = tuple[int, ...]
_STEPS = (2, 3, 4, 5, 6, 8, 12)
"""Steps along K of a warp."""
_WARPS = {
    **{("gemv_plan", 1): (1, 2, 4), ("gemv_plan", 2): (1, 2, 4), ("gemv_plan", 4): (1,)},
    **{("dense_plan", 1): (4,), ("dense_plan", 2): (4,), ("dense_plan", 4): (1,)},
}
"""Of the kernels that come compiled."""
_SPLITS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 16, 24)


class Asked(NamedTuple):
    """One question: the function, and its arguments but the device."""

    function: str
    """"gemv_plan", "dense_plan" or "matmul_splits"."""
    arguments: tuple[int, ...]


def key_of(asked: Asked) -> str:
    """Where the table has the answer."""
    if asked.function != "matmul_splits":
        *bits, tiles, pieces, tokens, copies = asked.arguments
        return "".join(f"dense{n} " for n in bits) + f"gemv {tokens} {tiles}x{pieces}x{copies}"
    tiles, chunks, blocks, tokens, each = asked.arguments
    return f"matmul {tokens} {tiles}x{chunks}x{blocks}x{each}"


def rule_of(asked: Asked, processors: int) -> Plan:
    """The answer without a table."""
    if asked.function == "gemv_plan":
        return tuning.gemv_rule(*asked.arguments)
    if asked.function == "dense_plan":
        return tuning.dense_rule(*asked.arguments[1:])
    return (tuning.matmul_rule(processors, *asked.arguments),)


def plans_for(asked: Asked) -> list[Plan]:
    """Answers to try: what the workspace has room for."""
    if asked.function != "matmul_splits":
        tiles, pieces, tokens, copies = asked.arguments[-4:]
        plans: set[Plan] = {
            (warps, -(-pieces // (warps * steps)), *ahead)
            for warps in _WARPS[asked.function, tokens]
            for steps in _STEPS
            for ahead in ([(0,), (2,)] if asked.function == "gemv_plan" else [()])
        }
        return sorted(plan for plan in plans if _fits(plan[1], tiles * copies, tokens))
    tiles, chunks, blocks, tokens, _ = asked.arguments
    splits = {-(-chunks // -(-chunks // wanted)) for wanted in _SPLITS if wanted <= chunks}
    return sorted((count,) for count in splits if _fits(count, tiles * blocks, tokens))


def _fits(splits: int, tiles: int, tokens: int) -> bool:
    return splits == 1 or (tiles <= COUNTERS and splits * tiles * 128 * tokens <= PARTIALS)


@contextlib.contextmanager
def answered(function: str, answer: Callable[..., Any]) -> Iterator[None]:
    """While this lasts, `answer` answers for `function` in every module of the kernels."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("conclave.kernels.") and hasattr(module, function):
                stack.enter_context(patch.object(module, function, answer))
        yield


def questions(launch: Callable[[], object]) -> list[Asked]:
    """What a launch asks."""
    found: list[Asked] = []

    def noting(function: str) -> Callable[..., Any]:
        original = getattr(tuning, function)

        def answer(device: Any, *arguments: int) -> Any:
            found.append(Asked(function, arguments))
            return original(device, *arguments)

        return answer

    with (
        answered("gemv_plan", noting("gemv_plan")),
        answered("dense_plan", noting("dense_plan")),
        answered("matmul_splits", noting("matmul_splits")),
    ):
        launch()
    return list(dict.fromkeys(found))

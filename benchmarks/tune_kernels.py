"""Finds the fastest shares of programs for each shape on this card, for `kernels/tuned.json`.

The rules of `conclave.kernels.tuning` stand for most; only what beats them by more than 2 %, in a
second measurement in turn with the rule, is written down. Needs a card that nobody else uses.
"""

import argparse
import gc
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from conclave.kernels import tuning

from .clock import Launch, launches_over, replayed
from .contestants import DENSE4, DENSE8, SPARSE, Contestant, ours
from .experts import choices, own_stack, random_stack
from .plans import Asked, Plan, answered, key_of, plans_for, questions, rule_of
from .shapes import EXPERTS_EACH, LINEARS, STACKS, Shape

LEAST_GAIN = 1.02
TOKENS = {SPARSE: (1, 2, 4, 8, 16, 32, 64), DENSE4: (1, 2, 4), DENSE8: (1,)}
console = Console(stderr=True)


def main() -> None:
    """Measure every shape, print, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--tokens", nargs="+", type=int, help="of a linear; all if left out")
    parser.add_argument("--dry", action="store_true", help="print only; write no table")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of the table")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU; this measures kernels on one")
    torch.manual_seed(0)
    card = torch.cuda.get_device_name()
    own = dict(tuning.tuned_entries().get(card, {}))
    for shape in track((*LINEARS, *STACKS), "tuning", console=console):
        for work in works(shape, options.kinds, options.tokens):
            for asked in questions(partial(work.launch, 0)):
                rule, best, gain = sweep(asked, work)
                print(
                    f"{shape!s:14} {work.tokens:4d}  {key_of(asked):30} "
                    f"rule {rule!s:9} best {best!s:9} {gain:.3f}x"
                )
                own.pop(key_of(asked), None)
                if gain > LEAST_GAIN:
                    own[key_of(asked)] = list(best)
        gc.collect()
        torch.cuda.empty_cache()
    print(f"{len(own)} entries for {card}")
    if not options.dry:
        tuning.write_table({**tuning.tuned_entries(), card: own})
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(tuning.TABLE, options.out)


class Work(NamedTuple):
    """Something to time for a shape."""

    tokens: int
    launch: Launch
    launches: int


def works(shape: Shape, kinds: list[str], counts: list[int] | None) -> Iterator[Work]:
    """The shape's weight, in each kind, times random activations, at each number of tokens."""
    if shape.experts and SPARSE not in kinds:
        return
    if shape.experts:
        weight = random_stack(shape)
        for tokens in (1, 8):
            chosen = choices(tokens, shape.experts)
            stack = own_stack(weight, chosen)
            x = torch.randn(tokens * EXPERTS_EACH, shape.columns, dtype=weight.dtype, device="cuda")
            yield Work(tokens, partial(stack.multiply, x), len(chosen))
        return
    weight = torch.randn(shape.rows, shape.columns, dtype=torch.bfloat16, device="cuda")
    for kind in kinds:
        (way,) = ours(kind)(weight)
        for tokens in (each for each in TOKENS[kind] if not counts or each in counts):
            yield Work(
                tokens, partial(_single, way, way.activations(tokens)), launches_over(way.copies)
            )


def _single(way: Contestant, x: Tensor, index: int) -> Tensor:
    return way.multiply(x, index % way.copies)


def sweep(asked: Asked, work: Work) -> tuple[Plan, Plan, float]:
    """The rule's plan, the best one and how much faster that is, measured in turn."""
    rule = rule_of(asked, torch.cuda.get_device_properties().multi_processor_count)
    times = {plan: _time(asked, plan, work, 1) for plan in plans_for(asked)}
    best = min(times, key=lambda plan: times[plan])
    if best == rule:
        return rule, best, 1.0
    turns = [[_time(asked, plan, work, 3) for plan in (rule, best)] for _ in range(3)]
    by_rule, by_best = map(median, zip(*turns, strict=True))
    return rule, best, by_rule / by_best


def _time(asked: Asked, plan: Plan, work: Work, repeats: int) -> float:
    def answer(*_: object) -> object:
        return plan[0] if asked.function == "matmul_splits" else plan

    with answered(asked.function, answer):
        return replayed(work.launch, work.launches, repeats, milliseconds=2).median


if __name__ == "__main__":
    main()

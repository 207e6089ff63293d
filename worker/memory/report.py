"""A plan in words: for people, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from .experts.slots import ExpertSlots
from .forecast import FORESEEN, Forecast, Rates
from .plan import Plan, gib
from .timeline import Timeline


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a plan brings, at rates that are told."""

    plan: Plan
    rates: Rates
    given: tuple[str, ...]
    """The rates that the user has given, by name."""
    measured: bool
    """Whether the others are those of this machine."""
    steps: tuple[Forecast, ...]
    balance: int | None
    """Tokens of a step at which computing takes as long as copying."""
    timelines: dict[str, Timeline]
    """Of the steps, in their order."""


def as_json(outlook: Outlook) -> dict[str, Any]:
    """Bytes, seconds, tokens a second."""
    plan, residency, slots = outlook.plan, outlook.plan.residency, outlook.plan.experts
    return {
        "budget_bytes": plan.budget,
        "rest_bytes": plan.rest,
        "resident_bytes": residency.stays,
        "slots": residency.slots,
        "slot_bytes": residency.slot_bytes,
        "coded": residency.working > 0,
        "working_bytes": residency.working,
        "step_bytes": plan.step,
        "cache_bytes": plan.cache,
        "layers": len(residency.blocks),
        "streamed": list(residency.streamed),
        "copied_bytes": residency.copied,
        "experts": None if slots is None else _experts(slots),
        "layers_ahead": plan.ahead,
        "balance_tokens": outlook.balance,
        "rates": {
            **asdict(outlook.rates),
            **{"given": list(outlook.given), "measured": outlook.measured},
        },
        "steps": [
            _step(each)
            | {"waited_seconds": timeline.waited if slots is None else each.seconds - each.busy}
            for each, timeline in zip(outlook.steps, outlook.timelines.values(), strict=True)
        ],
    }


def _experts(slots: ExpertSlots) -> dict[str, Any]:
    return {
        "layers": len(slots.layers),
        "experts_each": slots.experts,
        "slots": slots.slots,
        "slot_bytes": slots.expert_bytes,
        "share": slots.share,
        "assumed_hit_rate": slots.hit_rate,
        "host_bytes": slots.host_bytes,
    }


def tables(outlook: Outlook) -> list[Table]:
    """Where the budget goes, and how long steps take."""
    return [_memory(outlook.plan), _steps(outlook)]


def _step(found: Forecast) -> dict[str, Any]:
    return {
        "tokens": found.tokens,
        "compute_seconds": found.compute,
        "decode_seconds": found.decode,
        "transfer_seconds": found.transfer,
        "seconds": found.seconds,
        "tokens_per_second": found.tokens / found.seconds,
        "limit": found.limit,
        "prefetch_gain": found.gain,
    }


def _memory(plan: Plan) -> Table:
    own, slots = plan.residency, plan.experts
    copied = len(own.streamed)
    how = ", without experts" if slots else ", in a shorter code" if own.working else ""
    rows: list[tuple[str, int]] = [
        ("embeddings, head, norms, routers", plan.rest),
        (f"{len(own.blocks) - copied} layers that stay{how}", own.stays),
    ]
    if copied:
        slot = "slot" if own.slots == 1 else "slots"
        rows.append((f"{own.slots} {slot} for {copied} layers", own.slots * own.slot_bytes))
    if slots is not None:
        rows.append((f"{slots.slots} slots for {slots.share:.0%} of the experts", slots.bytes))
    if own.working:
        rows.append(("a slot that modules are decoded into", own.working))
    rows += [("the worst step", plan.step), ("keys and values", plan.cache)]
    table = _table(f"{gib(plan.budget)} on the device", ("", "bytes"))
    for name, size in rows:
        table.add_row(name, gib(size))
    host = f"on the host {gib(own.copied)}, all copied at every step" if own.streamed else None
    if slots is not None:
        host = f"on the host {gib(slots.host_bytes)}: all experts, fetched one by one"
    table.caption, table.caption_justify = host or "nothing is streamed", "left"
    return table


def _steps(outlook: Outlook) -> Table:
    coded = outlook.plan.residency.working > 0
    table = _table(
        f"One step ({_rates(outlook)})",
        (
            *("tokens", "compute", *(["decode"] if coded else [])),
            *("copies", "step", "tokens/s", "limit", "gain"),
        ),
    )
    for each in outlook.steps:
        decode = [each.decode] if coded else []
        parts = (each.compute, *decode, each.transfer, each.seconds)
        times = (f"{1e3 * own:.1f} ms" for own in parts)
        rate = _number(each.tokens / each.seconds)
        table.add_row(str(each.tokens), *times, rate, each.limit, f"{each.gain:.2f}x")
    table.caption = "gain: of prefetch over copying on demand"
    if outlook.plan.experts is not None:
        table.caption = (
            f"assumed: {outlook.plan.experts.hit_rate:.0%} of one token's experts are in slots "
            f"(LRU, as published of 128 experts), {FORESEEN:.0%} of the others are foreseen\n"
            + table.caption
        )
    if outlook.balance is not None:
        table.caption += f"; computing takes as long as copying at {outlook.balance} tokens a step"
    table.caption_justify = "left"
    return table


def _rates(outlook: Outlook) -> str:
    """Each with its unit, and where it is from."""
    other = "measured here" if outlook.measured else "assumed"
    kinds = (("link", "link", 1e9, "GB/s"), ("weights", "memory", 1e9, "GB/s"))
    return ", ".join(
        f"{what} {_number(getattr(outlook.rates, name) / unit)} {units} "
        f"{'as given' if name in outlook.given else other}"
        for what, name, unit, units in (*kinds, ("products", "compute", 1e12, "TFLOP/s"))
    )


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    return table

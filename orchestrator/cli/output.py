"""What commands print: answers on stdout, everything else on stderr."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...worker.precision import Precision
from ..client import Ensemble
from ..routing.registry import WorkerState

# A file or a pipe has no width: nothing is cut off there.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 250)
errors = Console(stderr=True, highlight=False)

COLOURS = {
    WorkerState.STARTING: "yellow",
    WorkerState.SERVING: "green",
    WorkerState.DRAINING: "yellow",
    WorkerState.DOWN: "red",
}


def state_text(state: WorkerState) -> str:
    """A worker's state in its colour."""
    return f"[{COLOURS[state]}]{state.name.lower()}[/]"


def worker_table(workers: Iterable[Any]) -> Table:
    """Workers as rows; takes the gateway's own records as well as the client's."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in (
        *("worker", "state", "model", "device", "weights", "address"),
        *("open", "served", "restarts"),
    ):
        table.add_column(column, no_wrap=True, overflow="fold")
    table.add_column("reason")
    for worker in workers:
        table.add_row(
            worker.name,
            state_text(worker.state),
            worker.model,
            worker.device,
            weights_text(worker.precision),
            worker.address,
            str(worker.open_requests),
            str(worker.served_requests),
            str(worker.restarts),
            escape(worker.reason),
        )
    return table


def weights_text(precision: Precision | None) -> str:
    """What is left of a worker's weights, and what one takes."""
    if precision is None:
        return ""
    return f"{precision}, {precision.bits_per_weight:.3g} bits a weight"


def member_table(ensemble: Ensemble) -> Table:
    """Who did what in an ensemble."""
    table = Table(box=None, header_style="dim", style="dim", pad_edge=False)
    for column in ("member", "worker", "role", "state", "agreed", "tokens", "seconds", "logprob"):
        table.add_column(column, no_wrap=True)
    table.add_column("says")
    for member in ensemble.members:
        logprob = "" if member.mean_logprob is None else f"{member.mean_logprob:.3f}"
        table.add_row(
            str(member.member),
            member.worker,
            member.role,
            member.state,
            "yes" if member.agreed else "no",
            str(member.completion_tokens),
            f"{member.total:.2f}",
            logprob,
            escape(member.reason or member.answer or ""),
        )
    return table


def print_json(value: object) -> None:
    """One value as one line of JSON."""
    print(json.dumps(_plain(value), ensure_ascii=False), flush=True)


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.name.lower()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value

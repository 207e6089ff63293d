"""Arenas that live as long as there are tests of theirs, on one event loop.

The short form: every fault once. `make soak` injects each of them twenty times and more.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

# The suite stands on the stub workers of `benchmarks/`, which lie beside it in the tree.
ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: too long for every run; select it with -m soak")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the long ones out unless they are asked for; the others come last.

    What they share, Ray clusters above all, would take its part of the machine from all others.
    """
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    items[:] = [item for item in items if item not in own] + own
    if "soak" in config.getoption("-m"):
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


class Stage:
    """One arena, its ledger, and the verdict on one fault after the other."""

    def __init__(self, runner: asyncio.Runner, arena: Any) -> None:
        self._runner = runner
        self._arena = arena

    def survive(self, fault: Any) -> None:
        """Injects a fault; fails with all violations if there are any."""
        from .checker import check

        begun = len(self._arena.ledger.entries())
        self._runner.run(self._arena.round(fault))
        verdict = check(self._arena.ledger.entries()[begun:])
        print(verdict)
        assert not verdict.violations, str(verdict)


Open = Callable[[Any], Awaitable[Any]]


def staged(runner: asyncio.Runner, folder: Path, opened: Open) -> Iterator[Stage]:
    from .ledger import Ledger

    with Ledger(folder / "ledger.jsonl") as ledger:
        arena = runner.run(_open(opened, ledger))
        yield Stage(runner, arena)
        runner.run(_close(arena))


async def _open(opened: Open, ledger: Any) -> Any:
    return await opened(ledger)


async def _close(arena: Any) -> None:
    async with arena:
        pass


@pytest.fixture(scope="package")
def stub_stage(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Stub workers behind a real gateway."""
    from .arena import StubArena

    yield from staged(runner, tmp_path_factory.mktemp("stub"), StubArena.open)


@pytest.fixture(scope="module")
def engine_stage(
    runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """Real engines behind a real gateway, without Ray."""
    from .engine_faults import EngineArena

    yield from staged(runner, tmp_path_factory.mktemp("engine"), EngineArena.open)


@pytest.fixture(scope="module")
def ray_stage(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A whole fleet in a Ray cluster of two nodes."""
    from .ray_faults import RayArena

    yield from staged(runner, tmp_path_factory.mktemp("ray"), RayArena.open)

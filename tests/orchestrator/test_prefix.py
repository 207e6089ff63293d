"""What the gateway knows of prompt beginnings, and what it makes of it when it chooses a worker."""

import pytest

from conclave.orchestrator.routing.prefix import BLOCK_BYTES, BLOCK_TOKENS, PrefixIndex
from conclave.orchestrator.routing.registry import Beat, Registry, Worker, WorkerState
from conclave.orchestrator.routing.router import Wish, choose

A, B, C = (letter * BLOCK_BYTES for letter in (b"a", b"b", b"c"))


def test_the_longest_known_beginning_counts() -> None:
    index = PrefixIndex()
    index.note(A + B, "one")
    index.note(A + C, "two")
    assert index.find(A + B + C).worker == "one"
    assert index.find(A + B + C).tokens == 2 * BLOCK_TOKENS
    assert index.find(A + A).worker == "two", "the last one with this beginning"
    assert index.find(B).worker == "" and index.find(A[:-1]).tokens == 0


def test_what_was_not_used_lately_is_forgotten() -> None:
    index = PrefixIndex(capacity=2)
    index.note(A, "one")
    index.note(B, "two")
    index.find(A)
    index.note(C, "three")
    assert index.find(A).worker == "one" and index.find(B).worker == ""


def test_it_expects_as_much_as_turned_out_to_be_there() -> None:
    index = PrefixIndex()
    index.note(A + B, "one")
    assert index.find(A + B).expected == 2 * BLOCK_TOKENS
    for _ in range(100):
        index.learn(index.find(A + B), cached=BLOCK_TOKENS // 2)
    assert index.find(A + B).expected == pytest.approx(BLOCK_TOKENS // 2, abs=1)
    for _ in range(100):
        index.learn(index.find(A + B), cached=9 * BLOCK_TOKENS)
    assert index.find(A + B).expected == pytest.approx(2 * BLOCK_TOKENS, abs=1)


def chosen(wish: Wish, *open_tokens: int) -> str:
    workers = [
        Worker(str(number), state=WorkerState.SERVING, open_tokens=tokens)
        for number, tokens in enumerate(open_tokens)
    ]
    worker = choose(workers, wish, 0.0)
    assert worker is not None
    return worker.name


def test_who_knows_the_prompt_may_have_as_much_more_to_do_as_it_saves() -> None:
    index = PrefixIndex()
    index.note(16 * A, "1")
    known = index.find(16 * A)
    assert known.expected == 1024
    wish = Wish(tokens=1100, warm=("1",), known=known)
    assert chosen(wish, 0, 1000) == "1"
    assert chosen(wish, 0, 3000) == "0"
    assert chosen(Wish(tokens=1100), 0, 1000) == "0"


def test_what_is_known_is_no_work_and_not_another_gateways() -> None:
    registry = Registry()
    worker = registry.declare("one")
    worker.open_tokens, worker.known_tokens = 1100, 1024
    assert worker.outstanding_tokens == 76
    registry.beat("one", Beat(1100, 0.0, None))  # it has not yet looked into its cache
    assert worker.outstanding_tokens == 76
    registry.beat("one", Beat(1200, 0.0, None))
    assert worker.outstanding_tokens == 176

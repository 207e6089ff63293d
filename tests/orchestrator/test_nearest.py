"""Which way the gateway takes to a worker."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conclave.orchestrator.lines import nearest as module
from conclave.orchestrator.lines.nearest import nearest
from conclave.worker.address import local_name

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such sockets")

ADDRESS = "127.0.0.1:50051"
ELSEWHERE = "198.51.100.7:50051"
"""Of a network that is in examples only (RFC 5737)."""


@pytest.fixture
def listening() -> Iterator[None]:
    """There is a Unix socket with the name of each worker's."""
    with socket.socket(socket.AF_UNIX) as own, socket.socket(socket.AF_UNIX) as false:
        for each, address in ((own, ADDRESS), (false, ELSEWHERE)):
            each.bind("\0" + local_name(address))
            each.listen()
        yield


def test_a_worker_on_this_machine_is_spoken_to_by_its_unix_socket(listening: None) -> None:
    assert nearest(ADDRESS) == "unix-abstract:conclave-127.0.0.1-50051"
    assert nearest("127.0.0.1:50052") == "127.0.0.1:50052"
    assert nearest("127.0.0.1:5005") == "127.0.0.1:5005"


def test_who_takes_the_name_of_a_worker_elsewhere_is_not_spoken_to(listening: None) -> None:
    assert nearest(ELSEWHERE) == ELSEWHERE


def test_elsewhere_it_is_spoken_to_by_tcp() -> None:
    assert nearest(ADDRESS) == ADDRESS


def test_without_a_list_of_sockets_it_is_tcp(
    listening: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "SOCKETS", tmp_path / "unix")
    assert nearest(ADDRESS) == ADDRESS


def test_every_address_has_a_name_of_its_own() -> None:
    addresses = ["127.0.0.1:1", "127.0.0.1:11", "10.0.0.1:1", "[::1]:1", "[::]:1", "localhost:1"]
    assert len({local_name(address) for address in addresses}) == len(addresses)

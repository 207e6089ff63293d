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

ADDRESS = "10.1.2.3:50051"


@pytest.fixture
def listening() -> Iterator[None]:
    """A worker's Unix socket is there."""
    with socket.socket(socket.AF_UNIX) as own:
        own.bind("\0" + local_name(ADDRESS))
        own.listen()
        yield


def test_a_worker_on_this_machine_is_spoken_to_by_its_unix_socket(listening: None) -> None:
    assert nearest(ADDRESS) == "unix-abstract:conclave-10.1.2.3-50051"
    assert nearest("10.1.2.3:50052") == "10.1.2.3:50052"
    assert nearest("10.1.2.3:5005") == "10.1.2.3:5005"


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

"""A worker on the loopback, and a client's view of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from conclave.protos.worker_pb2_grpc import WorkerServiceStub
from conclave.worker.config import EngineConfig, WorkerConfig
from conclave.worker.serving.server import WorkerServer


@dataclass(frozen=True)
class Worker:
    """A running server with a channel to it."""

    server: WorkerServer
    channel: grpc.Channel
    stub: WorkerServiceStub


def start(folder: Path) -> Iterator[Worker]:
    engine = EngineConfig(model=folder, max_context=200, kv_tokens=4096, block_size=4, threads=1)
    server = WorkerServer(WorkerConfig(name="alice", engine=engine, labels={"tier": "test"}))
    with grpc.insecure_channel(server.address) as channel:
        yield Worker(server, channel, WorkerServiceStub(channel))
    server.stop()


@pytest.fixture(scope="module")
def worker(text_checkpoint: Path) -> Iterator[Worker]:
    """One for all tests of a module."""
    yield from start(text_checkpoint)


@pytest.fixture
def own_worker(text_checkpoint: Path) -> Iterator[Worker]:
    """One that a test may drain or break."""
    yield from start(text_checkpoint)

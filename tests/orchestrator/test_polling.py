"""gRPC's polling engine is chosen before gRPC is imported, and never against the operator."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_EXPERIMENTS"))

sys.meta_path.insert(0, Watch())
import conclave.orchestrator
"""


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, "-event_engine_client,-event_engine_listener"),
        ({"GRPC_EXPERIMENTS": ""}, ""),
    ],
)
def test_what_grpc_finds_when_it_is_imported(given: dict[str, str], used: str) -> None:
    bare = {key: value for key, value in os.environ.items() if key != "GRPC_EXPERIMENTS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=bare | given, capture_output=True, text=True
    )
    assert done.stdout == used + "\n", done.stderr

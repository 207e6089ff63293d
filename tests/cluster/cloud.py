"""A cloud on this machine: Ray's autoscaler with its fake provider, whose nodes are processes here.

The local twin of cluster.yaml: node types with a GPU that nobody has. Ray's own helpers for this
stop every Ray process of the machine; this one knows its processes and ends only those.
"""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

from ray.util import get_node_ip_address

HEAD = "f" * 51 + "00000"
"""The fake provider counts node ids upwards from this one."""
HEAD_TYPE = "ray.head.default"
"""Nor does it take another type for the head."""
IDLE_MINUTES = 0.05
STORE_BYTES = 100 * 2**20
"""Of every node's object store, which we do not use."""


def provider_file(folder: Path, address: str, gpu_nodes: int) -> Path:
    """An autoscaler configuration with nodes of one fake GPU each."""
    kinds = {
        HEAD_TYPE: {"resources": {"CPU": 2}, "min_workers": 0, "max_workers": 0},
        "gpu": {
            "resources": {"CPU": 1, "GPU": 1, "object_store_memory": STORE_BYTES},
            "min_workers": 0,
            "max_workers": gpu_nodes,
        },
    }
    config = {
        "cluster_name": "fake",
        "max_workers": gpu_nodes,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "fake_multinode",
            "head_node_id": HEAD,
            "gcs_address": address,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": HEAD_TYPE,
        "available_node_types": {name: kind | {"node_config": {}} for name, kind in kinds.items()},
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    path = folder / "autoscaling.json"
    path.write_text(json.dumps(config))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cloud:
    """A Ray head with an autoscaler that can start so many GPU nodes."""

    def __init__(self, ground: Any, gpu_nodes: int) -> None:
        self._ground = ground
        port = free_port()
        self.address = f"{get_node_ip_address()}:{port}"
        config = provider_file(ground.folder, self.address, gpu_nodes)
        self.head: subprocess.Popen[bytes] = ground.start(
            "cloud.log",
            *("ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}"),
            *(f"--autoscaling-config={config}", "--include-dashboard=false"),
            f"--object-store-memory={STORE_BYTES}",
            # Of its own: the default ones may belong to another Ray of this machine.
            *(f"--ray-client-server-port={free_port()}", f"--temp-dir={ground.folder}/cloud"),
            RAY_FAKE_CLUSTER="1",
            AUTOSCALER_UPDATE_INTERVAL_S="1",
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD,
            RAY_CLOUD_INSTANCE_ID=HEAD,
        )
        ground.until(
            lambda: "Ray runtime started" in ground.log("cloud.log"),
            lambda: ground.log("cloud.log"),
        )

    def close(self) -> None:
        """Ends the head and whatever it has started, by process id."""
        for process in [self.head.pid, *descendants(self.head.pid)]:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.head.wait()

    def gpu_nodes(self) -> int:
        """How many GPU nodes there are now: each has a raylet of its own."""
        raylets = [pid for pid in descendants(self.head.pid) if command(pid).startswith("raylet")]
        return len(raylets) - 1


def command(process: int) -> str:
    """The name of a process's program."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def descendants(process: int) -> list[int]:
    """Process ids of children, their children and so on."""
    found, unseen = [], [process]
    while unseen:
        parent = unseen.pop()
        for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                children = [int(word) for word in tasks.read_text().split()]
            except OSError:
                continue
            found += children
            unseen += children
    return found

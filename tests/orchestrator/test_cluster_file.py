"""cluster.yaml is what Ray's own launcher accepts, and holds together."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from conclave.orchestrator.config import FleetConfig

ROOT = Path(__file__).resolve().parents[2]


def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def gpu_types() -> dict[str, Any]:
    types = cluster()["available_node_types"]
    return {name: kind for name, kind in types.items() if kind["resources"].get("GPU", 0) > 0}


def test_valid_by_rays_schema() -> None:
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    jsonschema.validate(cluster(), json.loads(schema.read_text()))


def test_valid_after_rays_launcher_has_filled_it_in() -> None:
    prepared = prepare_config(cluster())
    validate_config(prepared)
    assert "--shm-size=16g" in prepared["docker"]["run_options"]


def test_node_types_hold_together() -> None:
    data = cluster()
    assert data["head_node_type"] in data["available_node_types"]
    assert data["head_node_type"] not in gpu_types()
    assert "--gpus all" in data["docker"]["worker_run_options"]
    for name, kind in gpu_types().items():
        assert kind["resources"]["GPU"] == 1, "one GPU, one worker"
        assert kind["resources"][kind["labels"]["accelerator"]] == 1
        assert 0 <= kind["min_workers"] <= kind["max_workers"] <= data["max_workers"]
        spot = "InstanceMarketOptions" in kind["node_config"]
        assert spot == (kind["labels"]["market"] == "spot") == name.endswith("-spot")


def test_spot_comes_before_on_demand() -> None:
    types = gpu_types()
    pairs = [(types[name], types[f"{name}-spot"]) for name in types if f"{name}-spot" in types]
    assert pairs and all(spot["priority"] > steady["priority"] for steady, spot in pairs)


def test_the_gpu_fleet_fits_the_cluster() -> None:
    config = FleetConfig.load(ROOT / "examples" / "gpu_fleet.yaml")
    for group in config.workers:
        wanted = {"CPU": group.resources.num_cpus, "GPU": group.resources.num_gpus}
        wanted |= group.resources.custom
        room = sum(
            kind["max_workers"]
            for kind in gpu_types().values()
            if all(kind["resources"].get(name, 0) >= amount for name, amount in wanted.items())
        )
        spare = 1 if group.surge == "always" else 0
        assert room >= group.largest + spare, f"too few nodes for the group {group.name}"
    assert len(config.specs()) <= cluster()["max_workers"]

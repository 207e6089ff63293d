"""cluster.yaml is what Ray's own launcher accepts."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import ray.autoscaler
import yaml

ROOT = Path(__file__).resolve().parents[2]


def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def test_valid_by_rays_schema() -> None:
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    jsonschema.validate(cluster(), json.loads(schema.read_text()))


def test_node_types_hold_together() -> None:
    data = cluster()
    types = data["available_node_types"]
    assert data["head_node_type"] in types
    gpu = [kind for kind in types.values() if kind["resources"].get("GPU", 0) > 0]
    assert gpu, "no node type has a GPU"
    assert all(kind["min_workers"] <= kind["max_workers"] <= data["max_workers"] for kind in gpu)

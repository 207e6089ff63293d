from pathlib import Path

import pytest
import yaml

from conclave.orchestrator.config import FleetConfig, FleetConfigError
from conclave.worker import Knobs

ROOT = Path(__file__).resolve().parents[2]
ONE: dict[str, object] = {"name": "a", "engine": {"model": "m"}}


def parse(*groups: dict[str, object], **fields: object) -> FleetConfig:
    return FleetConfig.parse({"workers": list(groups), **fields}, source="fleet.yaml")


def test_names_of_replicas() -> None:
    config = parse(ONE, ONE | {"name": "b", "replicas": 2}, ONE | {"name": "c", "replicas": 0})
    assert [spec.name for spec in config.specs()] == ["a", "b-0", "b-1"]


def test_specs_carry_everything_a_worker_needs() -> None:
    group = ONE | {
        "engine": {"model": "m", "threads": 2},
        "labels": {"tier": "x"},
        "resources": {"num_cpus": 0.5, "num_gpus": 1, "custom": {"fast": 1}},
        "detached": True,
    }
    (spec,) = parse(group, gateway={"max_message_mib": 8}).specs()
    assert spec.config.engine.threads == 2
    assert spec.config.labels == {"tier": "x"}
    assert spec.config.max_message_mib == 8
    assert (spec.resources.num_cpus, spec.resources.num_gpus) == (0.5, 1)
    assert spec.resources.max_restarts == -1
    assert spec.detached


def test_knobs_of_an_engine() -> None:
    plain = parse(ONE).specs()[0]
    text = "workers: [{name: a, engine: {model: m, knobs: {sparsity: 0.5, memory_budget: 60%}}}]"
    (spec,) = FleetConfig.parse(yaml.safe_load(text), source="fleet.yaml").specs()
    assert spec.config.engine.knobs == Knobs(sparsity=0.5, memory_budget="60%")
    assert plain.config.engine.knobs == Knobs() and plain.version != spec.version


def test_model_paths_start_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("workers: [{name: a, engine: {model: x/y}}, {name: b, engine: {model: /z}}]")
    models = [spec.config.engine.model for spec in FleetConfig.load(path).specs()]
    assert models == [tmp_path / "x/y", Path("/z")]


@pytest.mark.parametrize(
    ("groups", "fields", "message"),
    [
        ([ONE | {"replica": 3}], {}, r"workers\[0\].replica: unknown key; did you mean `replicas`"),
        ([{"name": "a"}], {}, r"workers\[0\].engine: is missing"),
        ([ONE | {"engine": {"model": "m", "treads": 1}}], {}, "did you mean `threads`"),
        (
            [ONE | {"engine": {"model": "m", "knobs": {"eviction": True}}}],
            {},
            r"knobs.eviction: unknown key; known here: .*, max_error, memory_budget, prefetch",
        ),
        (
            [ONE | {"engine": {"model": "m", "knobs": {"memory_budget": "8 GB"}}}],
            {},
            r"engine.knobs.memory_budget: give GiB, such as 12.5, or a share .* \(given: '8 GB'\)",
        ),
        (
            [ONE | {"engine": {"model": "m", "kv_tokens": 9, "knobs": {"memory_budget": 8}}}],
            {},
            r"engine: kv_tokens and knobs.memory_budget both size the KV cache",
        ),
        (
            [ONE | {"engine": {"model": "m", "kv_host_gib": 1, "prefix_cache": False}}],
            {},
            r"engine: kv_host_gib keeps what prefix_cache finds",
        ),
        (
            [ONE | {"engine": {"model": "m", "kv_host_gib": 1, "knobs": {"max_error": 0.01}}}],
            {},
            r"engine: kv_host_gib keeps keys and values in the model's dtype only",
        ),
        ([ONE | {"name": "a b"}], {}, r"workers\[0\].name: .*'a b'"),
        ([ONE | {"resources": {"num_gpus": "many"}}], {}, r"resources.num_gpus.*'many'"),
        ([ONE, ONE], {}, "given twice: a"),
        ([ONE | {"replicas": 0}], {}, "at least one worker"),
        ([ONE], {"gateway": {"port": 70000}}, r"gateway.port: .*70000"),
        ([ONE], {"gatway": {}}, "gatway: unknown key; did you mean `gateway`"),
        ([ONE], {"gateway": {"zzz": 1}}, "known here: host, port"),
    ],
)
def test_errors_name_the_place(
    groups: list[dict[str, object]], fields: dict[str, object], message: str
) -> None:
    with pytest.raises(FleetConfigError, match=message) as caught:
        parse(*groups, **fields)
    assert str(caught.value).startswith("fleet.yaml: ")


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    with pytest.raises(FleetConfigError, match="cannot be read"):
        FleetConfig.load(path)
    path.write_text("workers: [")
    with pytest.raises(FleetConfigError, match="is not YAML"):
        FleetConfig.load(path)
    path.write_text("- a list")
    with pytest.raises(FleetConfigError, match="must be a mapping"):
        FleetConfig.load(path)


@pytest.mark.parametrize("name", ["fleet.yaml", "examples/gpu_fleet.yaml"])
def test_shipped_fleets_are_valid(name: str) -> None:
    assert FleetConfig.load(ROOT / name).specs()

"""LoRA adapters merged on the way: against a merge by hand, and whatever cannot be merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conclave.kernels.formats import Format
from conclave.worker.compress.layerwise import compress_checkpoint, measure
from conclave.worker.compress.manifest import MANIFEST
from conclave.worker.compress.recipe import Recipe
from conclave.worker.compress.sources.adapter import Adapter
from conclave.worker.errors import CheckpointError, ConfigError
from conclave.worker.model.config import ModelConfig
from conclave.worker.weights import load_decoder, model_tensors

Checkpoint = Callable[[int | str], Path]
CPU = torch.device("cpu")
RECIPE = Recipe(Format.parse("8:16-bf16"), "wanda", {"layers.0.*": None})
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False}
PREFIX = "base_model.model.model.layers"


def tokens() -> Tensor:
    return torch.randint(3, 290, (4, 24), generator=torch.Generator().manual_seed(3))


def write(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **settings}))
    return folder


def pair(module: str, rows: int, columns: int, rank: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(len(module))
    return {
        f"{module}.lora_A.weight": torch.randn(rank, columns, generator=draw) * 0.1,
        f"{module}.lora_B.weight": torch.randn(rows, rank, generator=draw) * 0.1,
    }


def product(tensors: dict[str, Tensor], module: str) -> Tensor:
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


def merged(source: Path, folder: Path, changes: dict[str, Tensor]) -> Path:
    """A copy of a checkpoint with something added to its tensors."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: own + changes.get(name, 0.0) for name, own in weights.items()},
        folder / "model.safetensors",
    )
    return folder


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("variant", "root"), [("3", "model"), ("12-wrapper", "model.language_model")]
)
def test_merged_as_by_hand(
    variant: str, root: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Ranks and alphas by pattern, in either style of names; the same bytes, the same measures."""
    source = tiny_checkpoint(variant)
    shapes = {name: own.shape for name, own in load_file(source / "model.safetensors").items()}
    modules = [
        *(f"{root}.layers.{index}.self_attn.q_proj" for index in range(7)),
        *(f"{root}.layers.1.mlp.down_proj", f"{root}.layers.0.self_attn.v_proj"),
        *(f"{root}.layers.2.per_layer_projection", f"{root}.per_layer_model_projection"),
    ]
    ranks = {module: 2 if "mlp" in module else 4 for module in modules}
    tensors: dict[str, Tensor] = {}
    for name in modules:
        rows, columns = shapes[f"{name}.weight"]
        tensors |= pair(f"base_model.model.{name}", rows, columns, ranks[name])
    scales = {
        name: 32 / 4 if name.endswith("0.self_attn.q_proj") else 8 / ranks[name] for name in modules
    }
    folder = write(
        tmp_path / "adapter",
        tensors,
        rank_pattern={r"mlp\.down_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 32},
    )
    by_hand = merged(
        source,
        tmp_path / "merged",
        {
            f"{name}.weight": scales[name] * product(tensors, f"base_model.model.{name}")
            for name in modules
        },
    )
    adapter = Adapter(folder, ModelConfig.load(source))
    for origin, name, own in ((source, "a", adapter), (by_hand, "b", None)):
        compress_checkpoint(origin, tmp_path / name, RECIPE, tokens(), CPU, {}, adapter=own)
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")
    about = json.loads((tmp_path / "a" / MANIFEST).read_text())["about"]
    assert about["adapter"] == {"fingerprint": adapter.fingerprint, "unused_tensors": 0}
    assert measure(source, tokens(), CPU, adapter=adapter) == measure(by_hand, tokens(), CPU)


def test_other_scales_and_whole_weights(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """rslora; a norm and a head trained in full; LoRA on an embedding that is not the head."""
    source = tiny_checkpoint("8")
    config = ModelConfig.load(source)
    module = f"{PREFIX}.1.mlp.gate_proj"
    table = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(4, 512),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(64, 4),
        "base_model.model.lm_head.weight": torch.randn(512, 64),
        f"{PREFIX}.2.input_layernorm.weight": torch.rand(64).bfloat16(),
    }
    tensors = pair(module, 96, 64) | table
    adapter = Adapter(write(tmp_path / "adapter", tensors, use_rslora=True), config)
    old = model_tensors(load_decoder(source, config, CPU, torch.float32))
    low, high, head, norm = table.values()
    for name, ours, expected in (
        (
            "layers.1.mlp.gate_proj.weight",
            old["layers.1.feed_forward.mlp.gate_up.weight"][:96],
            old["layers.1.feed_forward.mlp.gate_up.weight"][:96] + 4 * product(tensors, module),
        ),
        (
            "embed_tokens.weight",
            old["embedding.weight"],
            old["embedding.weight"] + 4 * (high @ low).T,
        ),
        ("lm_head.weight", old["head.weight"], head),
        ("layers.2.input_layernorm.weight", old["layers.2.attention_norm.weight"], norm.float()),
        ("norm.weight", old["norm.weight"], old["norm.weight"]),
    ):
        torch.testing.assert_close(adapter.change(name, ours), expected)


def test_a_tied_pair(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = ModelConfig.load(tiny_checkpoint("1"))
    embedding, head = (
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    )
    value, other = torch.randn(512, 64), torch.randn(512, 64)
    for tensors, settings in (
        ({embedding: value}, {"ensure_weight_tying": True}),
        ({embedding: value, head: value.clone()}, {}),
    ):
        adapter = Adapter(write(tmp_path / "good", tensors, **settings), config)
        assert torch.equal(adapter.change("embed_tokens.weight", other), value)
    low = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 512)}
    low["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.ones(64, 4)
    for tensors in ({embedding: value}, {head: value}, {embedding: value, head: other}, low):
        with pytest.raises(CheckpointError, match="train both in full and as one"):
            Adapter(write(tmp_path / "bad", tensors), config)


def test_what_a_text_model_has_not_is_counted(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = pair("base_model.model.model.vision_tower.layers.0.q_proj", 3, 5)
    tensors |= pair(f"{PREFIX}.6.self_attn.k_proj", 16, 64)
    tensors |= pair(f"{PREFIX}.0.self_attn.k_proj", 16, 64)
    adapter = Adapter(write(tmp_path / "a", tensors), ModelConfig.load(tiny_checkpoint("4")))
    assert len(adapter.unused) == 4 and adapter.about()["unused_tensors"] == 4


GOOD = pair(f"{PREFIX}.0.self_attn.q_proj", 64, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters is set"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices is set"),
        ({"some_day": {"x": 1}}, "some_day is set"),
        ({"bias": "all"}, "bias: .*only plain LoRA"),
        ({"peft_type": "LOHA"}, "peft_type: .*only plain LoRA"),
        ({"r": 0}, "r: "),
        ({"lora_alpha": None}, "lora_alpha: "),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"rank_pattern": {"(": 3}}, "cannot be read"),
        ({"r": 8}, r"lora_A.weight is F32 \[4, 64\], expected \[8, 64\]"),
    ],
)
def test_settings_that_are_refused(
    settings: dict[str, Any], message: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config = ModelConfig.load(tiny_checkpoint("1"))
    Adapter(write(tmp_path / "good", GOOD, eva_config=None, lora_dropout=0.1), config)
    with pytest.raises(CheckpointError, match=message):
        Adapter(write(tmp_path / "bad", GOOD, **settings), config)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair(f"{PREFIX}.9.self_attn.q_proj", 64, 64), r"layers\.9\..* is for no weight"),
        (pair("model.layers.0.self_attn.q_proj", 64, 64), "is for no weight"),
        ({f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(1)}, "magnitude"),
        (pair(f"{PREFIX}.0.self_attn.q_proj", 64, 65), r"\[4, 65\], expected \[4, 64\]"),
        (pair(f"{PREFIX}.0.input_layernorm", 64, 64), "has no such part"),
        (dict([next(iter(GOOD.items()))]), "is there without its B"),
        ({f"{PREFIX}.0.layer_scalar": torch.ones(1, dtype=torch.int32)}, "is I32"),
        ({f"{PREFIX}.0.layer_scalar": torch.ones(2)}, r"expected \[1\]"),
        ({}, "nothing that changes"),
        (
            GOOD | pair("base_model.model.model.language_model.layers.0.self_attn.q_proj", 64, 64),
            "are the same",
        ),
    ],
)
def test_tensors_that_are_refused(
    tensors: dict[str, Tensor], message: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Adapter(write(tmp_path / "bad", tensors), ModelConfig.load(tiny_checkpoint("1")))


def test_files_that_are_not_there(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = ModelConfig.load(tiny_checkpoint("1"))
    with pytest.raises(CheckpointError, match="name the folder of a PEFT adapter"):
        Adapter(tmp_path, config)
    folder = write(tmp_path / "a", GOOD)
    (folder / "adapter_config.json").write_text("[" * 5)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Adapter(folder, config)
    write(folder, GOOD)
    (folder / "adapter_model.safetensors").write_bytes(b"\x08" * 64)
    with pytest.raises(CheckpointError, match="no readable safetensors"):
        Adapter(folder, config)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="save the adapter as safetensors"):
        Adapter(folder, config)


def test_another_adapter_does_not_go_on(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("1")
    config = ModelConfig.load(source)
    adapters = [
        Adapter(write(tmp_path / str(alpha), GOOD, lora_alpha=alpha), config) for alpha in (8, 9)
    ]

    def kill(done: int, layers: int) -> None:
        raise InterruptedError

    made = tmp_path / "made"
    with pytest.raises(InterruptedError):
        compress_checkpoint(source, made, RECIPE, tokens(), CPU, {}, kill, adapters[0])
    for other in (adapters[1], None):
        with pytest.raises(ConfigError, match="another run"):
            compress_checkpoint(source, made, RECIPE, tokens(), CPU, {}, adapter=other)
    compress_checkpoint(source, made, RECIPE, tokens(), CPU, {}, adapter=adapters[0])

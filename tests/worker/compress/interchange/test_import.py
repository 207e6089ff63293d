"""What is imported: our own exports byte by byte, others' checkpoints code by code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conclave.kernels.formats import Format, PackedWeight
from conclave.kernels.layouts import codes_of, pack_codes, scales_of
from conclave.worker.compress.checkpoint import CheckpointWriter
from conclave.worker.compress.interchange.exporter import STYLES, Style, export_checkpoint
from conclave.worker.compress.interchange.importer import import_checkpoint
from conclave.worker.compress.interchange.maps import FILE
from conclave.worker.compress.interchange.seal import SEAL
from conclave.worker.compress.reader import read_list, read_weights
from conclave.worker.errors import CheckpointError, ConfigError
from conclave.worker.model.config import ModelConfig
from conclave.worker.weights import model_tensors

from .conftest import (
    CPU,
    Compressed,
    Exported,
    compressed_decoder,
    content,
    edit,
    logits_of,
    rewrite,
    stock_logits,
    tensors_of,
    write,
)

QKV, MLP = "layers.0.attention.qkv.weight", "layers.0.feed_forward.mlp.gate_up.weight"
SELF = "model.layers.0.self_attn"


def weights_of(folder: Path, file: str = "layer-000.safetensors") -> dict[str, Any]:
    manifest, contents = read_list(folder, ModelConfig.load(folder))
    return read_weights(folder / file, manifest.files[file], contents, manifest.weights, CPU)


@pytest.fixture
def foreign(exported: Exported, tmp_path: Path) -> Path:
    """An export of variant 1 as somebody else's: one file, no seal, no maps."""
    folder = tmp_path / "foreign"
    shutil.copytree(exported("1", "pack-quantized"), folder)
    rewrite(folder, tensors_of(folder))
    for name in (FILE, "conclave-config.json"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("variant", ["1", "3", "4", "7", "7-bf16", "8", "12", "12-wrapper"])
def test_the_way_back_has_the_same_bytes(
    variant: str, style: Style, compressed: Compressed, exported: Exported, tmp_path: Path
) -> None:
    import_checkpoint(exported(variant, style), tmp_path / "back")
    assert content(tmp_path / "back") == content(compressed(variant))


def random_packed(text: str, rows: int, columns: int) -> PackedWeight:
    """Any code anywhere, zero and the lowest too; some scales zero, tiny or the largest."""
    format, generator = Format.parse(text), torch.Generator().manual_seed(rows)
    strength = torch.rand(rows, columns // 16, 16, generator=generator)
    mask = torch.zeros_like(strength, dtype=torch.bool)
    mask.scatter_(-1, strength.topk(format.kept).indices, True)
    limit = 2 ** (format.bits - 1)
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8)
    codes *= mask.flatten(1)
    scales = torch.rand(rows, columns // format.group, generator=generator).bfloat16()
    scales[:3, 0] = torch.tensor([0.0, 1e-40, 3e38])
    assert {-limit, 0, limit - 1} <= set(codes.flatten().tolist())
    return pack_codes(codes, format, scales, None if format.dense else mask.flatten(1))


def test_odd_weights_have_the_same_bytes(compressed: Compressed, tmp_path: Path) -> None:
    source = compressed("1")
    contents = read_list(source, ModelConfig.load(source))[1]
    weights = {
        name: own for file in contents.files for name, own in weights_of(source, file).items()
    }
    for text, name in {
        "5:16-int4-g32": QKV,
        "6:16-int8-g64": MLP,
        "dense-int4-g32": MLP.replace("gate_up", "down"),
    }.items():
        weights[name] = random_packed(text, *contents.shapes[name])
    odd = write(CheckpointWriter(tmp_path / "odd", source), weights)
    export_checkpoint(odd, tmp_path / "out", "pack-quantized")
    import_checkpoint(tmp_path / "out", tmp_path / "back")
    assert content(tmp_path / "back") == content(odd)


def test_without_maps_weights_are_dense(
    foreign: Path, compressed: Compressed, tmp_path: Path
) -> None:
    """And have the same codes, scales and values; without a seal, config.json is made anew."""
    outcomes = import_checkpoint(foreign, tmp_path / "made")
    kinds = {each.format.split("-")[0] for each in outcomes}
    assert kinds == {"dense", "plain float32", "plain bfloat16"}
    ours, theirs = weights_of(compressed("1")), weights_of(tmp_path / "made")
    assert ours[QKV].format != theirs[QKV].format
    assert torch.equal(codes_of(ours[QKV]), codes_of(theirs[QKV]))
    assert torch.equal(scales_of(ours[QKV]), scales_of(theirs[QKV]))
    expected = logits_of(compressed_decoder(compressed("1")))
    assert torch.equal(logits_of(compressed_decoder(tmp_path / "made")), expected)


def test_maps_from_elsewhere(
    foreign: Path, exported: Exported, compressed: Compressed, tmp_path: Path
) -> None:
    maps = exported("1", "pack-quantized") / FILE
    import_checkpoint(foreign, tmp_path / "made", maps)
    for file in ("layer-000.safetensors", "layer-003.safetensors", "rest.safetensors"):
        assert (tmp_path / "made" / file).read_bytes() == (compressed("1") / file).read_bytes()
    changed, stored = tmp_path / "changed.safetensors", f"{SELF}.k_proj.weight.bitmask"
    octets = load_file(maps)[stored]
    for change, message in (
        ({stored: torch.zeros_like(octets)}, "has values where its map has none"),
        ({stored: octets[:-1].clone()}, "does not fit"),
        ({"model.layers.9.x.bitmask": octets}, "is of no weight of this model"),
    ):
        save_file({**load_file(maps), **change}, changed)
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(foreign, tmp_path / "other", changed)
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
    # More of one group survive: as good a map, but the weight has no N of 16 any more.
    octets[0, 0] |= 255
    save_file({**load_file(maps), stored: octets}, changed)
    import_checkpoint(foreign, tmp_path / "other", changed)
    assert weights_of(tmp_path / "other")[QKV].format == Format.parse("dense-int4-g32")
    assert weights_of(compressed("1"))[QKV].format == Format.parse("5:16-int4-g32")
    with pytest.raises(CheckpointError, match="does not exist: name a file of maps"):
        import_checkpoint(foreign, tmp_path / "none", tmp_path / "nowhere")


def test_stale_scales_are_told(exported: Exported, tmp_path: Path) -> None:
    """A dense export that was trained on, beside the maps of what it was."""
    folder = tmp_path / "trained"
    shutil.copytree(exported("1", "dense"), folder)
    tensors = tensors_of(folder)
    tensors[f"{SELF}.q_proj.weight"] *= 1.01
    rewrite(folder, tensors)
    with pytest.raises(CheckpointError, match=r"q_proj.weight is no longer what its scales"):
        import_checkpoint(folder, tmp_path / "made")


def test_what_fits_no_format_is_plain_and_exact(
    foreign: Path, compressed: Compressed, tmp_path: Path
) -> None:
    """Keys that are plain, and an MLP of which one weight is quantized."""
    expected = compressed_decoder(compressed("1"))
    tensors = tensors_of(foreign)
    values = model_tensors(expected)
    for name, own in (
        (f"{SELF}.k_proj", values[QKV][64:96]),
        ("model.layers.0.mlp.gate_proj", values[MLP][:96]),
    ):
        for field in ("packed", "scale", "shape"):
            del tensors[f"{name}.weight_{field}"]
        tensors[f"{name}.weight"] = own.detach().contiguous()
    rewrite(foreign, tensors)
    outcomes = {each.name: each.format for each in import_checkpoint(foreign, tmp_path / "made")}
    down = MLP.replace("gate_up", "down")
    assert {outcomes[name] for name in (QKV, MLP, down)} == {"plain float32"}
    made = compressed_decoder(tmp_path / "made")
    assert torch.equal(logits_of(made), logits_of(expected))


def compressed_by_others(folder: Path, source: Path) -> Any:
    """A wrapper's checkpoint quantized and saved by compressed-tensors itself, group 32."""
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    wrapper: Any = transformers.Gemma4ForConditionalGeneration
    model = wrapper.from_pretrained(source)
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head", r"re:.*per_layer_projection$"],
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            largest = module.weight.detach().unflatten(-1, (-1, 32)).abs().amax(-1)
            module.weight_scale.data.copy_((largest / 7).bfloat16())
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return model


def test_a_wrapper_that_others_have_quantized(
    tiny_checkpoint: Callable[[int | str], Path], tmp_path: Path
) -> None:
    model = compressed_by_others(tmp_path / "theirs", tiny_checkpoint("12-wrapper"))
    tensors = tensors_of(tmp_path / "theirs")
    assert "model.language_model.layers.0.self_attn.q_proj.weight_packed" in tensors
    outcomes = import_checkpoint(tmp_path / "theirs", tmp_path / "made")
    own = {each.format for each in outcomes if each.name.startswith("layers.")}
    assert own == {"dense-int4-g32"}
    made = compressed_decoder(tmp_path / "made")
    torch.testing.assert_close(stock_logits(model), logits_of(made), rtol=0, atol=1e-3)
    gate = weights_of(tmp_path / "made")["layers.0.per_layer_input.gate.weight"]
    assert gate.dtype == torch.float32  # quantized there, never packed here


def scheme(**changes: object) -> Callable[[Any], object]:
    """An edit of the first group's weights."""
    return lambda config: config["quantization_config"]["config_groups"]["group_0"][
        "weights"
    ].update(changes)


def section(**changes: object) -> Callable[[Any], object]:
    return lambda config: config["quantization_config"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scheme(symmetric=False), "symmetric must be True, not False: symmetric int4 or int8"),
        (scheme(num_bits=3), "num_bits must be 8 or 4, not 3"),
        (scheme(strategy="channel"), "strategy must be 'group'"),
        (scheme(group_size=16), "group_size must be 32 or 64 or 128, not 16"),
        (scheme(type="float"), "type must be 'int', not 'float'"),
        (scheme(dynamic=True), "dynamic must be"),
        (scheme(actorder="group"), "actorder must be"),
        (section(format="nvfp4-pack-quantized"), "format must be 'pack-quantized'"),
        (section(quant_method="gptq"), "quant_method must be 'compressed-tensors', not 'gptq'"),
        (section(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme must be empty"),
        (section(sparsity_config={"format": "sparse-bitmask"}), "sparsity_config must be empty"),
        (section(transform_config={"config_groups": {}}), "transform_config must be empty"),
        (section(config_groups=None), "config_groups must be an object"),
        (section(config_groups={"a": []}), "config_groups.a must be an object"),
        (lambda config: config.pop("quantization_config"), "in no scheme of quantization_config"),
        (lambda config: config.update(hidden_size=32), "in no scheme|expected"),
        (lambda config: config.update(text_config=3), "text_config must be an object"),
    ],
)
def test_schemes_that_cannot_be_taken_over(
    change: Callable[[Any], object], message: str, foreign: Path, tmp_path: Path
) -> None:
    edit(foreign / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(foreign, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_activations_that_are_quantized_too(foreign: Path, tmp_path: Path) -> None:
    edit(
        foreign / "config.json",
        lambda config: config["quantization_config"]["config_groups"]["group_0"].update(
            input_activations={"num_bits": 8}
        ),
    )
    with pytest.raises(CheckpointError, match="input_activations must be null"):
        import_checkpoint(foreign, tmp_path / "made")


Tensors = dict[str, torch.Tensor]


def scaled(value: float, dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        own = tensors[f"{SELF}.q_proj.weight_scale"].to(dtype)
        own[0, 0] = value
        tensors[f"{SELF}.q_proj.weight_scale"] = own

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scaled(1.0 + 2**-10, torch.float32), "q_proj.weight has scales that bfloat16 would"),
        (scaled(-1.0), "q_proj.weight: scales must be finite and not negative"),
        (scaled(float("nan")), "q_proj.weight: scales must be finite"),
        (
            lambda t: t.update({f"{SELF}.q_proj.weight_zero_point": torch.zeros(8, 2)}),
            "q_proj.weight is asymmetric",
        ),
        (
            lambda t: t.update({f"{SELF}.q_proj.weight_g_idx": torch.zeros(64)}),
            "q_proj.weight is grouped in order of activations",
        ),
        (
            lambda t: t.pop(f"{SELF}.q_proj.weight_shape"),
            r"q_proj.weight has \['packed', 'scale'\]",
        ),
        (lambda t: t.pop("model.norm.weight"), "norm.weight is missing"),
        (lambda t: t.update({"model.more": torch.zeros(1)}), "'model.more' is unexpected"),
        (lambda t: t[f"{SELF}.q_proj.weight_shape"].zero_(), r"says that it is \[0, 0\]"),
        (lambda t: t.update({"norm.weight": torch.zeros(64)}), "norm.weight is there twice"),
    ],
)
def test_tensors_that_cannot_be_taken_over(
    change: Callable[[Tensors], object], message: str, foreign: Path, tmp_path: Path
) -> None:
    tensors = tensors_of(foreign)
    change(tensors)
    rewrite(foreign, tensors)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(foreign, tmp_path / "made")


def test_scales_in_another_dtype_are_taken_over_if_they_can(
    foreign: Path, compressed: Compressed, tmp_path: Path
) -> None:
    tensors = tensors_of(foreign)
    wide = {n: t.float() if n.endswith("_scale") else t for n, t in tensors.items()}
    rewrite(foreign, wide)
    import_checkpoint(foreign, tmp_path / "made")
    ours, theirs = weights_of(compressed("1"))[QKV], weights_of(tmp_path / "made")[QKV]
    assert torch.equal(scales_of(ours), scales_of(theirs))


def test_a_changed_export_is_refused_by_name(exported: Exported, tmp_path: Path) -> None:
    source = exported("1", "pack-quantized")
    for path in source.iterdir():
        if path.name == SEAL:
            continue
        folder = tmp_path / path.name
        shutil.copytree(source, folder)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        for spoilt in (bytes(data), bytes(data[:-1]), None):
            if spoilt is None:
                (folder / path.name).unlink()
            else:
                (folder / path.name).write_bytes(spoilt)
            with pytest.raises(CheckpointError, match=path.name):
                import_checkpoint(folder, tmp_path / "made")


class Killed(Exception):
    pass


def test_going_on_after_a_kill(exported: Exported, compressed: Compressed, tmp_path: Path) -> None:
    source, folder = exported("3", "pack-quantized"), tmp_path / "made"

    def killed(done: int, files: int) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        import_checkpoint(source, folder, told=killed)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("layer-*")}
    with pytest.raises(ConfigError, match="another run"):
        import_checkpoint(exported("1", "pack-quantized"), folder)
    outcomes = import_checkpoint(source, folder)
    assert content(folder) == content(compressed("3"))
    assert all((folder / name).stat().st_mtime_ns == time for name, time in times.items())
    told = json.loads((folder / "conclave.json").read_text())["about"]["weights"]
    assert [each["name"] for each in told] == [each.name for each in outcomes]
    with pytest.raises(ConfigError, match="finished checkpoint"):
        import_checkpoint(source, folder)

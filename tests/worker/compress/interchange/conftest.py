"""Tiny compressed checkpoints with weights in many formats, and their exports."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conclave.kernels.formats import Format, PackedWeight
from conclave.kernels.layouts import pack
from conclave.worker.compress.checkpoint import CheckpointWriter
from conclave.worker.compress.contents import file_of, layer_file
from conclave.worker.compress.interchange.exporter import Style, export_checkpoint
from conclave.worker.compress.manifest import REST
from conclave.worker.compress.reader import load_compressed
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.packed import packed_order
from conclave.worker.weights import load_decoder

CPU = torch.device("cpu")
PROMPT = torch.tensor([5, 17, 333, 42, 8, 99, 250])
FORMATS = [
    *("5:16-int4-g32", "dense-int4-g64", "6:16-int8-g32", "1:16-int4-g32"),
    *("8:16-bf16", "dense-int8-g64", "4:16-int4-g64"),
]

Compressed = Callable[[str], Path]
Exported = Callable[[str, Style], Path]


def compress_somehow(source: Path, folder: Path) -> Path:
    """One format after the other, as far as they fit; every seventh module stays plain."""
    config = ModelConfig.load(source)
    decoder = load_decoder(source, config, CPU, torch.float32)
    writer = CheckpointWriter(folder, source)
    stored = next(iter(load_file(source / "model.safetensors").values())).dtype
    weights: dict[str, torch.Tensor | PackedWeight] = {
        name: decoder.state_dict()[name].to(stored).contiguous().clone()
        for name in writer.contents.shapes
    }
    turn = -1
    for number, names in enumerate(writer.contents.packable.values()):
        if number % 7 == 6 or any(writer.contents.shapes[name][-1] % 16 for name in names):
            continue
        for name in names:
            weight, turn = decoder.get_parameter(name).detach(), turn + 1
            format = next(each for each in _in_turn(turn) if fits(each, weight.shape[-1]))
            weights[name] = pack(packed_order(name, weight), format)
    return write(writer, weights)


def write(writer: CheckpointWriter, weights: dict[str, torch.Tensor | PackedWeight]) -> Path:
    for index in range(writer.contents.layers):
        own = {name: each for name, each in weights.items() if file_of(name) == layer_file(index)}
        writer.write_layer(index, own)
    writer.write_rest({name: each for name, each in weights.items() if file_of(name) == REST})
    writer.finish({"by": "a test"})
    return writer.folder


def fits(format: Format, columns: int) -> bool:
    return columns % max(16, format.group) == 0


def _in_turn(turn: int) -> Iterator[Format]:
    for place in range(len(FORMATS)):
        yield Format.parse(FORMATS[(turn + place) % len(FORMATS)])


def compressed_decoder(folder: Path) -> Decoder:
    return load_compressed(folder, ModelConfig.load(folder), CPU, torch.float32)


def logits_of(decoder: Decoder) -> torch.Tensor:
    attention = DenseAttention(decoder.config, [len(PROMPT)])
    with torch.inference_mode():
        return decoder.logits(decoder(PROMPT, torch.arange(len(PROMPT)), attention))


def stock_model(folder: Path) -> Any:
    """What transformers loads, with no key missing or left over, in float32."""
    import transformers

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    model, report = loaded
    assert not any(report.values()), report
    model.set_experts_implementation("eager")
    return model.eval()


def stock_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(PROMPT[None]).logits[0]
    return logits


def in_bfloat16(source: Path, folder: Path) -> Path:
    """The same checkpoint as most are: every tensor bfloat16."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    rounded = {name: each.bfloat16() for name, each in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """All files of a compressed checkpoint, without what nothing reads."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files["conclave.json"])
    del manifest["about"]
    return files | {"conclave.json": json.dumps(manifest).encode()}


def edit(path: Path, change: Callable[[Any], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of all shards of a Hugging Face folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put `tensors` in place of a folder's, as somebody else's checkpoint: without a seal."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    (folder / "conclave-export.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def compressed(
    tiny_checkpoint: Callable[[int | str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Compressed:
    """A variant's compressed checkpoint, written once a session; "7-bf16" is 7 in bfloat16."""
    made: dict[str, Path] = {}

    def folder_of(variant: str) -> Path:
        if variant not in made:
            folder = tmp_path_factory.mktemp(f"compressed-{variant}")
            source = tiny_checkpoint(variant.removesuffix("-bf16"))
            if variant.endswith("-bf16"):
                source = in_bfloat16(source, folder / "source")
            made[variant] = compress_somehow(source, folder / "made")
        return made[variant]

    return folder_of


@pytest.fixture(scope="session")
def exported(compressed: Compressed, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A variant's export in a style, written once a session: copy it to change it."""
    made: dict[tuple[str, Style], Path] = {}

    def folder_of(variant: str, style: Style) -> Path:
        if (variant, style) not in made:
            folder = tmp_path_factory.mktemp(f"{style}-{variant}") / "made"
            export_checkpoint(compressed(variant), folder, style)
            made[variant, style] = folder
        return made[variant, style]

    return folder_of

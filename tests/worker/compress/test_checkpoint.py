"""The compressed checkpoint: round trips, resuming, and whatever can happen to its files."""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conclave.kernels.formats import Format, PackedWeight
from conclave.kernels.layouts import pack, unpack
from conclave.worker import Engine
from conclave.worker.compress.checkpoint import CheckpointWriter, Weights
from conclave.worker.compress.contents import Contents, file_of
from conclave.worker.compress.fingerprint import fingerprint
from conclave.worker.compress.manifest import MANIFEST, PROGRESS, REST, FileRecord
from conclave.worker.compress.reader import load_compressed
from conclave.worker.config import EngineConfig
from conclave.worker.errors import CheckpointError, ConfigError
from conclave.worker.loading import load_model
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.packed import PackedExperts, PackedLinear, PackedMLP, packed_order
from conclave.worker.weights import load_decoder, model_tensors, tensor_map

Checkpoint = Callable[[int | str], Path]
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"max_context": 96, "kv_tokens": 256, "block_size": 4, "threads": 1}
MIXED = [Format.parse(text) for text in ("5:16-bf16", "dense-int8-g32", "8:16-bf16")]


def plain_decoder(folder: Path) -> Decoder:
    return load_decoder(folder, ModelConfig.load(folder), CPU, torch.float32)


def compressed_decoder(folder: Path, packed: bool | None = None) -> Decoder:
    return load_compressed(folder, ModelConfig.load(folder), CPU, torch.float32, packed=packed)


def mixed_weights(source: Path) -> tuple[dict[str, torch.Tensor | PackedWeight], Decoder]:
    """Weights in several formats, every fifth module plain; and a decoder with their values."""
    decoder = plain_decoder(source)
    contents = Contents(decoder.config)
    weights: dict[str, torch.Tensor | PackedWeight] = {
        name: decoder.state_dict()[name].clone() for name in contents.shapes
    }
    for index, names in enumerate(contents.packable.values()):
        columns = [contents.shapes[name][-1] for name in names]
        if index % 5 == 3 or any(count % 16 for count in columns):
            continue
        for place, name in enumerate(names):
            format = MIXED[(index + place) % 3 if columns[place] % 32 == 0 else 0]
            weight = decoder.get_parameter(name)
            packed = pack(packed_order(name, weight.detach()), format)
            weights[name] = packed
            rows = unpack(packed)
            if "gate_up" in name:
                rows = torch.cat((rows[..., ::2, :], rows[..., 1::2, :]), -2)
            with torch.no_grad():
                weight.copy_(rows)
    return weights, decoder


def of_file(weights: Weights, file: str) -> Weights:
    return {name: weight for name, weight in weights.items() if file_of(name) == file}


def write(writer: CheckpointWriter, weights: Weights) -> Path:
    """Whatever is not finished yet."""
    finished = writer.finished_layers()
    for index, file in enumerate(list(writer.contents.files)[:-1]):
        if index not in finished:
            writer.write_layer(index, of_file(weights, file))
    if not writer.has_rest():
        writer.write_rest(of_file(weights, REST))
    writer.finish({"by": "a test"})
    return writer.folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(first: Decoder, second: Decoder) -> bool:
    ours, theirs = model_tensors(first), model_tensors(second)
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


def logits_of(decoder: Decoder) -> torch.Tensor:
    prompt = torch.tensor([5, 17, 333, 42, 8, 99, 250])
    attention = DenseAttention(decoder.config, [len(prompt)])
    with torch.inference_mode():
        return decoder.logits(decoder(prompt, torch.arange(len(prompt)), attention))


@pytest.mark.parametrize("variant", ["1", "3", "6", "7", "8"])
def test_round_trip(variant: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint(variant)
    weights, expected = mixed_weights(source)
    folder = write(CheckpointWriter(tmp_path / "made", source), weights)
    assert same(compressed_decoder(folder), expected)
    kept = compressed_decoder(folder, packed=True)
    kinds = {type(module) for module in kept.modules()}
    assert kinds >= {PackedLinear, PackedMLP} and (PackedExperts in kinds) == (variant == "7")
    assert not any(parameter.is_meta for parameter in kept.parameters())
    torch.testing.assert_close(logits_of(kept), logits_of(expected), rtol=1e-4, atol=1e-4)
    again = write(CheckpointWriter(tmp_path / "again", source), weights)
    assert content(folder) == content(again)
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1, "who may read the list may read the weights"


def test_the_engine_runs_it_as_any_other(text_checkpoint: Path, tmp_path: Path) -> None:
    weights, expected = mixed_weights(text_checkpoint)
    folder = write(CheckpointWriter(tmp_path / "made", text_checkpoint), weights)
    dense = tmp_path / "dense"
    shutil.copytree(text_checkpoint, dense)
    state = model_tensors(expected)
    table = tensor_map(expected.config)
    rows = {f"model.{name}": own.view(state).detach() for name, own in table.items()}
    save_file(
        {name: each.contiguous().clone() for name, each in rows.items()},
        dense / "model.safetensors",
    )
    asked: dict[str, Any] = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
    with Engine(folder, **SMALL) as packed, Engine(dense, **SMALL) as plain:
        assert packed.model.parameters == plain.model.parameters
        assert packed.generate("Hello", **asked).text == plain.generate("Hello", **asked).text
    with pytest.raises(ConfigError, match="compressed already: leave it out"):
        Engine(folder, **SMALL, weight_format="dense-int8-g32")


def test_equal_weights_have_equal_fingerprints(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    weights, _ = mixed_weights(tiny_checkpoint("11"))
    folders = []
    for name in ("one", "two", "other"):
        if name == "other":
            weights["norm.weight"] = torch.ones(80)
        folders.append(write(CheckpointWriter(tmp_path / name, tiny_checkpoint("11")), weights))
    one, two, other = map(fingerprint, folders)
    assert one == two != other


def test_finished_layers_survive(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("8")
    weights, _ = mixed_weights(source)
    whole = content(write(CheckpointWriter(tmp_path / "whole", source), weights))
    folder = tmp_path / "made"
    first = CheckpointWriter(folder, source, "a")
    for index in (0, 1, 2):
        first.write_layer(index, of_file(weights, f"layer-00{index}.safetensors"))
    flip(folder / "layer-001.safetensors", 5000)
    (folder / "layer-002.safetensors").unlink()
    with pytest.raises(ConfigError, match="another run"):
        CheckpointWriter(folder, source, "b")
    with pytest.raises(ConfigError, match="another run"):
        CheckpointWriter(folder, tiny_checkpoint("1"), "a")
    second = CheckpointWriter(folder, source, "a")
    assert second.finished_layers() == [0] and not second.has_rest()
    for name, weight in second.read_layer(0).items():
        ours = weights[name]
        if isinstance(weight, PackedWeight):
            assert isinstance(ours, PackedWeight) and weight.format == ours.format
            assert all(torch.equal(a, ours.tensors()[f]) for f, a in weight.tensors().items())
        else:
            assert isinstance(ours, torch.Tensor) and torch.equal(weight, ours)
    with pytest.raises(CheckpointError, match="is not what was written"):
        second.read_layer(1)
    with pytest.raises(CheckpointError, match="has not been written"):
        second.read_layer(4)
    assert content(write(second, weights)) == whole
    with pytest.raises(ConfigError, match="holds a finished checkpoint"):
        CheckpointWriter(folder, source, "a")


class Killed(Exception):
    pass


def test_killed_anywhere(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after any renaming: nothing loads, and a second run ends with the same bytes."""
    source = tiny_checkpoint("11")
    weights, expected = mixed_weights(source)
    left = [10**9]
    sync = os.fsync

    def fsync(file: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    whole = content(write(CheckpointWriter(tmp_path / "whole", source), weights))
    steps = 10**9 - left[0]
    assert steps == 2 * (1 + 2 + 2 * 3 + 1)  # progress, copies, (file, progress) x 3, conclave.json
    for step in range(steps):
        folder, left[0] = tmp_path / str(step), step
        with pytest.raises(Killed):
            write(CheckpointWriter(folder, source), weights)
        left[0] = 10**9
        if step == steps - 1:  # all but tidied up
            assert same(compressed_decoder(folder), expected)
            continue
        with pytest.raises(CheckpointError):
            load_model(EngineConfig(model=folder, **SMALL))
        assert content(write(CheckpointWriter(folder, source), weights)) == whole


def test_what_the_writer_refuses(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("11")
    weights, _ = mixed_weights(source)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        CheckpointWriter(foreign, source)
    writer = CheckpointWriter(tmp_path / "made", source)
    layer = dict(of_file(weights, "layer-000.safetensors"))

    def refuses(message: str, **changes: torch.Tensor | PackedWeight | None) -> None:
        changed = {f"layers.0.{name}": each for name, each in changes.items()}
        given = {name: each for name, each in {**layer, **changed}.items() if each is not None}
        with pytest.raises(CheckpointError, match=message):
            writer.write_layer(0, given)

    refuses("layers.0.attention_norm.weight is missing", **{"attention_norm.weight": None})
    refuses("'layers.0.more' is unexpected", more=torch.ones(1))
    refuses(r"scalar is F32 \[2\], expected .* \[1\]", scalar=torch.ones(2))
    refuses(r"scalar is I32", scalar=torch.ones(1, dtype=torch.int32))
    down = "feed_forward.mlp.down.weight"
    refuses(r"gate_up.weight is packed but .*down.weight is not", **{down: torch.ones(80, 96)})
    gate = pack(torch.ones(8, 80), MIXED[0])
    refuses("'layers.0.per.gate' is no weight that can be packed", **{"per.gate": gate})
    refuses(r"packed as \[8, 80\], but", **{"attention.qkv.weight": gate})
    broken = pack(torch.ones(80, 96), MIXED[0])
    assert broken.positions is not None
    broken.positions.zero_()
    refuses("down.weight cannot be written: positions", **{down: broken})
    with pytest.raises(CheckpointError, match="not written yet, or damaged since: layer-000"):
        writer.finish({})
    with pytest.raises(CheckpointError, match="made is not finished: give the command"):
        load_model(EngineConfig(model=tmp_path / "made", **SMALL))


@pytest.fixture
def folder(text_checkpoint: Path, tmp_path: Path) -> Path:
    """A compressed checkpoint to spoil."""
    return write(
        CheckpointWriter(tmp_path / "m", text_checkpoint), mixed_weights(text_checkpoint)[0]
    )


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def relist(name: str, record: dict[str, Any], manifest: dict[str, Any]) -> None:
    manifest["files"][name] = record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "is of version 2, and this Conclave reads version 1"),
        (lambda m: m.pop("version"), "version: Field required"),
        (lambda m: m.update(more=1), "more: Extra inputs"),
        (lambda m: m["files"].update({"../x": m["files"][REST]}), "'../x', which is no part"),
        (lambda m: m["files"].pop(REST), "does not list rest.safetensors"),
        (lambda m: m["files"].pop("config.json"), "does not list config.json"),
        (lambda m: m["weights"].popitem(), "does not fit|pack both or neither"),
        (
            lambda m: m["weights"]["layers.0.attention.qkv.weight"].update(format="5:17-int4"),
            "layers.0.attention.qkv.weight: '5:17-int4' is no format",
        ),
    ],
)
def test_an_edited_manifest(
    change: Callable[[dict[str, Any]], object], message: str, folder: Path
) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        compressed_decoder(folder)


def test_tensors_that_lie_about_themselves(folder: Path) -> None:
    """Files whose checksums are right, but not their content."""
    name = "layer-000.safetensors"
    tensors = load_file(folder / name)
    key = "layers.0.attention.qkv.weight.positions"
    for spoilt, message in (
        (tensors | {key: tensors[key][:, :-1].contiguous()}, f"{key} is U8 .* expected U8"),
        (tensors | {key: torch.zeros_like(tensors[key])}, "distinct and ascend"),
    ):
        save_file(spoilt, folder / name)
        edit(folder, partial(relist, name, FileRecord.of(folder / name).model_dump()))
        with pytest.raises(CheckpointError, match=message):
            compressed_decoder(folder)


ODD: list[Any] = [
    *(None, True, 0, 1, -1, 2, 10**30, 1.5, float("nan"), "", "x", "../x", "\ud800", "\0"),
    *([], {}, [[]], {"a": 1}, "5:16-bf16", "dense-int8-g64", "dense-bf16", "0" * 64),
]


def spoil_manifest(folder: Path, draw: random.Random, name: str = MANIFEST) -> None:
    """Another value, another key or none, anywhere but in what is for people."""
    values = json.loads((folder / name).read_text())
    place, key = values, draw.choice(["version", "files", "weights"])
    while isinstance(place[key], dict) and place[key] and draw.random() < 0.9:
        place = place[key]
        key = draw.choice(list(place))
    old = place.pop(key)
    kind = draw.randrange(3)
    if kind == 0:
        place[key] = draw.choice([value for value in ODD if value != old or value is True])
    elif kind == 1:
        place[str(draw.choice(ODD))] = old
    (folder / name).write_text(json.dumps(values))


def spoil_file(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(sorted(path.name for path in folder.iterdir()))
    kind = draw.randrange(7)
    data = path.read_bytes()
    if kind < 2:
        start = draw.randrange(min(64, len(data))) if kind else draw.randrange(len(data))
        flip(path, start, draw.randrange(8))
    elif kind == 2:
        path.write_bytes(data[: draw.randrange(len(data))])
    elif kind == 3:
        path.write_bytes(data + draw.randbytes(draw.randrange(1, 9)))
    elif kind == 4:
        path.unlink()
    elif kind == 5:
        path.rename(path.with_name(draw.choice(["other", "layer-999.safetensors", "x.json"])))
    else:
        other = draw.choice([each for each in folder.iterdir() if each != path])
        shutil.copy(other, path)


def nested(folder: Path, draw: random.Random) -> None:
    (folder / MANIFEST).write_text("[" * draw.choice([10, 10**5]))


def a_folder_instead(folder: Path, draw: random.Random) -> None:
    path = draw.choice(sorted(folder.iterdir()))
    path.unlink()
    path.mkdir()


def test_three_hundred_corruptions(folder: Path) -> None:
    """Refused with CheckpointError, or, of a few edits of the list, nothing is lost."""
    whole, expected = content(folder), compressed_decoder(folder)
    settings = EngineConfig(model=folder, **SMALL)
    loaded = 0
    for seed in range(300):
        draw = random.Random(seed)
        spoil = draw.choices([spoil_manifest, spoil_file, nested, a_folder_instead], [10, 16, 1, 2])
        spoil[0](folder, draw)
        listed = whole[MANIFEST] == content_of(folder / MANIFEST)
        try:
            model = load_model(settings)
        except CheckpointError as error:
            assert str(error)
        else:
            loaded += 1
            assert not listed, f"{spoil[0].__name__}, seed {seed}: loaded what is not whole"
            assert same(model.runner.decoder, expected), f"seed {seed}"
        restore(folder, whole)
    assert loaded < 30
    assert same(compressed_decoder(folder), expected)


def test_a_spoilt_account_of_what_is_finished(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Refused, or the files that it no longer vouches for are written again."""
    source, folder = tiny_checkpoint("11"), tmp_path / "made"
    weights, expected = mixed_weights(source)
    first = CheckpointWriter(folder, source)
    first.write_layer(0, of_file(weights, "layer-000.safetensors"))
    whole, gone_on = content(folder), 0
    for seed in range(100):
        spoil_manifest(folder, random.Random(seed), PROGRESS)
        try:
            writer = CheckpointWriter(folder, source)
            for index in writer.finished_layers():
                writer.read_layer(index)
            write(writer, weights)
        except (CheckpointError, ConfigError):
            pass
        else:
            gone_on += 1
            assert same(compressed_decoder(folder), expected), f"seed {seed}"
        for path in folder.iterdir():
            path.unlink()
        restore(folder, whole)
    assert 0 < gone_on < 50


def content_of(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def restore(folder: Path, whole: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            path.rmdir()
        elif path.name not in whole:
            path.unlink()
    for name, data in whole.items():
        (folder / name).write_bytes(data)

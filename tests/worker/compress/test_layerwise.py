"""Whole checkpoints compressed layer by layer; killed and gone on with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.kernels.formats import Format, PackedWeight
from conclave.worker import Engine
from conclave.worker.compress import layerwise
from conclave.worker.compress.layerwise import compress_checkpoint, measure
from conclave.worker.compress.pruning import MODES, Mode, compress
from conclave.worker.compress.recipe import Recipe, allotted
from conclave.worker.errors import ConfigError
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.weights import load_decoder

Checkpoint = Callable[[int | str], Path]
CPU = torch.device("cpu")
BF16, INT8 = Format.parse("8:16-bf16"), Format.parse("dense-int8-g32")


def tokens(count: int = 6, length: int = 24) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(3, 290, (count, length), generator=draw)


def logits_of(decoder: Decoder, prompt: torch.Tensor) -> torch.Tensor:
    attention = DenseAttention(decoder.config, [len(prompt)])
    with torch.inference_mode():
        return decoder.logits(decoder(prompt, torch.arange(len(prompt)), attention))


def plain(folder: Path) -> Decoder:
    return load_decoder(folder, ModelConfig.load(folder), CPU, torch.float32)


def compressed(folder: Path) -> Decoder:
    with Engine(folder, max_context=96, kv_tokens=1024, block_size=4, threads=1) as engine:
        return engine.model.runner.decoder


@pytest.mark.parametrize("variant", ["1", "3", "7", "8"])
def test_every_kind_of_model(variant: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Half of the weights, exactly: the compressed model resembles the full one."""
    source = tiny_checkpoint(variant)
    outcomes = compress_checkpoint(
        source, tmp_path / "made", Recipe(BF16, "sparsegpt"), tokens(), CPU, {}
    )
    assert all(0 < each.error < 1 for each in outcomes)
    full, made = plain(source), compressed(tmp_path / "made")
    prompt = tokens(1).flatten()
    off = (logits_of(made, prompt) - logits_of(full, prompt)).norm() / logits_of(
        full, prompt
    ).norm()
    assert 0 < off < 1.2
    weights = [own for name, own in made.named_parameters() if name.endswith("qkv.weight")]
    for weight in weights:
        assert int((weight != 0).view(*weight.shape[:-1], -1, 16).sum(-1).max()) == 8


def test_modes_that_know_more_harm_less(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    errors = []
    for mode in MODES:
        outcomes = compress_checkpoint(
            tiny_checkpoint("1"), tmp_path / mode, Recipe(BF16, mode), tokens(24), CPU, {}
        )
        errors.append(sum(each.error for each in outcomes) / len(outcomes))
    magnitude, wanda, sparsegpt = errors
    assert sparsegpt < wanda <= magnitude * 1.02


def test_exceptions(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe(BF16, "wanda", {"*.attention.*": INT8, "layers.0.*": None})
    source = tiny_checkpoint("1")
    outcomes = compress_checkpoint(source, tmp_path / "made", recipe, tokens(), CPU, {})
    formats = {each.name: each.format for each in outcomes}
    assert formats["layers.0.attention.qkv.weight"] == "as it was"
    assert formats["layers.1.attention.qkv.weight"] == "dense-int8-g32"
    assert formats["layers.1.feed_forward.mlp.down.weight"] == "8:16-bf16"
    full, made = plain(source), compressed(tmp_path / "made")
    name = "layers.0.attention.qkv.weight"
    assert torch.equal(full.get_parameter(name), made.get_parameter(name))


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 6])
def test_gone_on_with_after_a_kill(
    at: int, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as without one; finished layers are not done again."""
    recipe, source = Recipe(BF16, "sparsegpt"), tiny_checkpoint("3")
    compress_checkpoint(source, tmp_path / "whole", recipe, tokens(), CPU, {"by": "test"})

    def kill(done: int, layers: int) -> None:
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        compress_checkpoint(source, tmp_path / "cut", recipe, tokens(), CPU, {"by": "test"}, kill)
    calls = []

    def counted(*given: Any) -> PackedWeight:
        calls.append(1)
        return compress(*given)

    monkeypatch.setattr(layerwise, "compress", counted)
    compress_checkpoint(source, tmp_path / "cut", recipe, tokens(), CPU, {"by": "test"})
    assert len(calls) == 4 * (8 - at)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_another_recipe_does_not_go_on(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("1")

    def kill(done: int, layers: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        compress_checkpoint(
            source, tmp_path / "made", Recipe(BF16, "wanda"), tokens(), CPU, {"mode": "wanda"}, kill
        )
    with pytest.raises(ConfigError, match="another run"):
        compress_checkpoint(
            source, tmp_path / "made", Recipe(BF16, "magnitude"), tokens(), CPU, {"mode": "other"}
        )


@pytest.mark.parametrize("mode", MODES)
def test_experts_that_saw_few_inputs(
    mode: Mode, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    outcomes = compress_checkpoint(
        tiny_checkpoint("7"), tmp_path / "made", Recipe(BF16, mode), tokens(1, 4), CPU, {}
    )
    few = [each for each in outcomes if "experts" in each.name]
    assert few and all(each.by_weights_alone == 4 and each.inputs == 4 for each in few)


def test_a_format_that_does_not_fit_names_the_weight(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    recipe = Recipe(Format.parse("dense-int4-g128"), "wanda")
    with pytest.raises(ConfigError, match=r"layers\.0\.attention\.qkv\.weight cannot be"):
        compress_checkpoint(tiny_checkpoint("1"), tmp_path / "made", recipe, tokens(), CPU, {})


def test_half_an_mlp_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe(BF16, "wanda", {"*.down.weight": None})
    with pytest.raises(ConfigError, match="together or not at all"):
        compress_checkpoint(tiny_checkpoint("1"), tmp_path / "made", recipe, tokens(), CPU, {})


def test_survivors_allotted_by_what_they_matter(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """At the same average; what is excepted keeps its format and does not count."""
    source, uniform = tiny_checkpoint("7"), Recipe(Format.parse("5:16-bf16"), "wanda")
    found = measure(source, tokens(12), CPU)
    recipe = allotted(uniform, found, 1 - 5 / 16, experts_alike=False)
    assert len({recipe.of(name) for name in found}) > 1
    kept = {name: own.kept for name in found if (own := recipe.of(name))}
    total = sum(each.weights for each in found.values())
    assert sum(found[name].weights * n for name, n in kept.items()) <= 5 * total
    harm = sum(found[name].errors[n] for name, n in kept.items())
    assert harm < sum(found[name].errors[5] for name in kept)
    outcomes = compress_checkpoint(source, tmp_path / "made", recipe, tokens(12), CPU, {})
    assert {each.name: each.format for each in outcomes} == {
        name: f"{n}:16-bf16" for name, n in kept.items()
    }
    alike = allotted(uniform, found, 1 - 5 / 16)
    for part in ("gate_up", "down"):
        same = {alike.of(name) for name in found if name.endswith(f"experts.{part}")}
        assert len(same) == 1
    assert alike.exceptions.keys() == recipe.exceptions.keys()
    partly = Recipe(uniform.format, "wanda", {"layers.0.*": INT8})
    assert allotted(partly, found, 0.7).of("layers.0.attention.qkv.weight") == INT8
    with pytest.raises(ConfigError, match="N:16"):
        allotted(Recipe(INT8, "wanda"), found, 0.7)

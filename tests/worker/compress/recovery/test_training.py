"""Recovery makes a compressed checkpoint better, and can be killed."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conclave.kernels.formats import Format, PackedWeight
from conclave.kernels.layouts import mask_of
from conclave.worker.compress.contents import Contents
from conclave.worker.compress.layerwise import compress_checkpoint
from conclave.worker.compress.manifest import MANIFEST, read_manifest
from conclave.worker.compress.reader import load_compressed, read_weights
from conclave.worker.compress.recipe import Recipe
from conclave.worker.compress.recovery.lessons import Lessons
from conclave.worker.compress.recovery.loss import hidden_states, losses
from conclave.worker.compress.recovery.optimizers import optimizers_of
from conclave.worker.compress.recovery.recover import recover_checkpoint
from conclave.worker.compress.recovery.schedule import OPTIMIZERS, Schedule
from conclave.worker.compress.recovery.training import Look
from conclave.worker.errors import CheckpointError, ConfigError
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder
from conclave.worker.weights import load_decoder

Checkpoint = Callable[[int | str], Path]
CPU = torch.device("cpu")


def text(count: int, seed: int = 3) -> torch.Tensor:
    """Sequences in which a token follows from the one before."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(3, 290, (count, 1), generator=draw)
    return 3 + (start + 7 * torch.arange(24)) % 287


@pytest.fixture
def pair(tiny_checkpoint: Checkpoint, tmp_path: Path) -> tuple[Path, Path]:
    """A compressed checkpoint and its original."""
    return made_of(tiny_checkpoint("1"), tmp_path)


def made_of(source: Path, folder: Path) -> tuple[Path, Path]:
    exact = Format.parse("5:16-bf16")  # fits experts of any width
    exceptions = {"layers.0.*": None, "*.experts.*": exact}
    tables = Format.parse("dense-int8-g32")
    recipe = Recipe(Format.parse("5:16-int4-g32"), "magnitude", exceptions, tables)
    compress_checkpoint(source, folder / "small", recipe, text(4), CPU, {"made": "here"})
    return folder / "small", source


def recover(
    pair: tuple[Path, Path], target: Path, schedule: Schedule, **more: object
) -> list[Look]:
    values = {"tokens": text(32), "held_out": text(8, seed=4), **more}
    return recover_checkpoint(*pair, target, **values, schedule=schedule, device=CPU)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, object]:
    manifest, held = read_manifest(folder / MANIFEST), Contents(ModelConfig.load(folder))
    found: dict[str, object] = {}
    for file in held.files:
        record = manifest.files[file]
        found |= read_weights(folder / file, record, held, manifest.weights, CPU)
    return found


@pytest.mark.parametrize(
    ("variant", "optimizer"),
    # Muon multiplies in bfloat16, which takes a CPU a minute for the others.
    [*((variant, "adamw") for variant in ("1", "3", "7", "8")), ("1", "muon")],
)
def test_it_comes_nearer_with_the_same_maps(
    variant: str, optimizer: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    pair = made_of(tiny_checkpoint(variant), tmp_path)
    rate = 3e-3 if optimizer == "adamw" else 0.01
    schedule = Schedule(
        steps=12, sequences=8, at_once=4, learning_rate=rate, looks=4, optimizer=optimizer
    )
    looks = recover(pair, tmp_path / "recovered", schedule)
    assert [look.step for look in looks] == [3, 6, 9, 12]
    assert looks[-1].training_divergence < 0.85 * looks[0].training_divergence
    assert looks[-1].divergence < looks[0].divergence
    before, after = contents(pair[0]), contents(tmp_path / "recovered")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if not isinstance(weight, torch.Tensor):
            assert torch.equal(mask_of(weight), mask_of(after[name])), name  # type: ignore[arg-type]
    about = read_manifest(tmp_path / "recovered" / MANIFEST).about
    assert about["made"] == "here" and about["recovery"]["best"]["step"] > 0
    config = ModelConfig.load(pair[1])
    assert load_compressed(tmp_path / "recovered", config, CPU, torch.float32)


@pytest.mark.parametrize(("remap", "optimizer"), [(0.0, "adamw"), (0.7, "adamw"), (0.7, "muon")])
def test_killed_it_goes_on_to_the_same_bytes(
    remap: float,
    optimizer: str,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("conclave.worker.compress.recovery.schedule._BETWEEN", 2)
    schedule = Schedule(
        steps=9, sequences=8, at_once=8, gradual=0.3, remap=remap, looks=3, optimizer=optimizer
    )
    recover(pair, tmp_path / "whole", schedule)

    def killed(step: int, done: float, look: Look | None) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(pair, tmp_path / "again", schedule, told=killed)
    assert (tmp_path / "again.training").exists()
    with pytest.raises(ConfigError, match="another run"):
        recover(pair, tmp_path / "again", Schedule(steps=8, sequences=8))
    steps: list[int] = []
    recover(pair, tmp_path / "again", schedule, told=lambda step, done, look: steps.append(step))
    assert steps == [7, 8, 9], "from the last look"
    assert not (tmp_path / "again.training").exists()
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name for path in (tmp_path / "again").iterdir()}
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_maps_are_learned_for_a_time(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then they have as many survivors as before, others among them, and do what was judged."""
    monkeypatch.setattr("conclave.worker.compress.recovery.schedule._BETWEEN", 2)
    pair = made_of(tiny_checkpoint("3"), tmp_path)
    schedule = Schedule(
        steps=12, sequences=8, at_once=4, learning_rate=0.02, text_share=0.0, remap=0.5, looks=6
    )
    looks = recover(pair, tmp_path / "recovered", schedule)
    before, after = contents(pair[0]), contents(tmp_path / "recovered")
    changed = 0
    for name, weight in before.items():
        if isinstance(weight, PackedWeight):
            masks = mask_of(weight), mask_of(after[name])  # type: ignore[arg-type]
            kept = [own.unflatten(-1, (-1, 16)).sum(-1) for own in masks]
            assert torch.equal(*kept), name
            changed += int((masks[0] != masks[1]).sum())
    assert changed > 0
    config = ModelConfig.load(pair[1])
    student = load_compressed(tmp_path / "recovered", config, CPU, torch.float32, packed=False)
    teacher = load_decoder(pair[1], config, CPU, torch.float32)
    judged = text(8, seed=4)
    with torch.no_grad():
        divergence = losses(
            student,
            [teacher],
            judged,
            [hidden_states(teacher, judged)],
            torch.ones(8, dtype=torch.bool),
        )[0]
    best = min(look.divergence for look in looks)
    assert divergence.item() == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("muon", [False, True])
def test_each_parameter_has_one_optimizer(muon: bool) -> None:
    student = torch.nn.ParameterDict(
        {
            **{"matrix": torch.ones(8, 8), "stack": torch.ones(2, 8, 8)},
            **{"scales": torch.ones(8, 2), "table": torch.ones(9, 8), "norm": torch.ones(8)},
        }
    )
    large, scales = [student["matrix"], student["stack"]], [student["scales"]]
    found = optimizers_of(student, large, scales, 0.5, muon)
    names = {id(own): name for name, own in student.items()}
    decays = {
        (type(own).__name__, group["weight_decay"]): sorted(names[id(p)] for p in group["params"])
        for own in found
        for group in own.param_groups
    }
    plain = ["stack", "table"]
    assert decays == {
        ("AdamW", 0.0): ["norm", "scales"],
        ("AdamW", 0.5): plain if muon else ["matrix", *plain],
        **({("Muon", 0.5): ["matrix"]} if muon else {}),
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_decay_with_their_scales(
    optimizer: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A step of nothing but decay takes the same share of all: the codes stay."""
    rate, decay = 1e-4, 500.0
    plainly = Schedule(steps=1, sequences=8, at_once=8, learning_rate=rate, optimizer=optimizer)
    recover(pair, tmp_path / "decayed", replace(plainly, weight_decay=decay))
    recover(pair, tmp_path / "plain", plainly)
    decayed, plain = contents(tmp_path / "decayed"), contents(tmp_path / "plain")
    for name, weight in plain.items():
        own = decayed[name]
        if isinstance(weight, torch.Tensor):
            share = 1 - rate * decay if weight.ndim > 1 else 1.0
            assert isinstance(own, torch.Tensor)
            torch.testing.assert_close(own.float(), weight.float() * share, rtol=8e-3, atol=2e-4)
            continue
        assert isinstance(own, PackedWeight) and isinstance(weight, PackedWeight)
        if weight.scales is not None and own.scales is not None and weight.format.bits == 4:
            expected = weight.scales.float() * (1 - rate * decay)
            torch.testing.assert_close(own.scales.float(), expected, rtol=1e-2, atol=0.0)
            assert (own.codes != weight.codes).float().mean() < 0.02, name


def test_several_teach_together(
    pair: tuple[Path, Path], tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Another shape with the same tokens teaches beside the original, and is not forgotten."""
    other, schedule = tiny_checkpoint("3"), Schedule(steps=4, sequences=8, looks=2)
    alone = recover(pair, tmp_path / "alone", schedule)
    together = recover(pair, tmp_path / "together", schedule, teachers=[other])
    assert together[-1].loss != alone[-1].loss
    about = read_manifest(tmp_path / "together" / MANIFEST).about
    assert about["recovery"]["teachers"] == [pair[1].name, other.name]


def test_teachers_have_the_same_tokens(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    config = json.loads((other / "config.json").read_text())
    text_config = config.get("text_config", config)
    text_config["vocab_size"] -= 8
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="tokens are others"):
        recover(pair, tmp_path / "a", Schedule(steps=1, sequences=4), teachers=[other])


def test_the_mean_of_probabilities_is_taught(tiny_checkpoint: Checkpoint) -> None:
    folders = [tiny_checkpoint(name) for name in ("1", "3")]
    teachers = [load_decoder(own, ModelConfig.load(own), CPU, torch.float32) for own in folders]
    tokens = text(3)
    lessons = Lessons(tokens, teachers)
    chosen = torch.tensor([2, 0])
    for _ in range(2):  # made, then as kept
        read, theirs, real = lessons.of(chosen)
        assert torch.equal(read, tokens[chosen]) and real.all()
        with torch.no_grad():
            divergence, loss = losses(teachers[0], teachers, read, theirs, real)
            each = [own.logits(hidden_states(own, read)).softmax(-1) for own in teachers]
        mean = (each[0] + each[1]) / 2
        expected = (mean * (mean.log() - each[0].log())).sum(-1).mean()
        torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-6)
        targets = read[:, 1:].flatten()
        torch.testing.assert_close(
            loss, -each[0].log().gather(1, targets[:, None]).mean(), rtol=1e-4, atol=1e-6
        )


def test_what_teachers_wrote_is_not_learned_as_text(tiny_checkpoint: Checkpoint) -> None:
    """The divergence is of all rows, the likelihood of those that are real; of none it is 0."""
    student, teacher = (
        load_decoder(own, ModelConfig.load(own), CPU, torch.float32)
        for own in (tiny_checkpoint("3"), tiny_checkpoint("1"))
    )
    tokens = text(4)
    lessons = Lessons(tokens, [teacher], written=2)
    with torch.no_grad():
        whole = losses(student, [teacher], *lessons.of(torch.tensor([0, 3, 1])))
        real = losses(student, [teacher], *lessons.of(torch.tensor([0, 1])))
        written = losses(student, [teacher], *lessons.of(torch.tensor([3])))
    torch.testing.assert_close(whole[1], real[1])
    torch.testing.assert_close(whole[0], (2 * real[0] + written[0]) / 3)
    assert written[1] == 0 and written[0] > 0


@pytest.mark.parametrize("room", [0, 2, 5])
def test_lessons_without_room_are_made_again(
    room: int, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tiny_checkpoint(name) for name in ("1", "3")]
    teachers = [load_decoder(own, ModelConfig.load(own), CPU, torch.float32) for own in folders]
    tokens = text(5)
    with torch.no_grad():
        truth = [hidden_states(own, tokens).unflatten(0, (5, -1)) for own in teachers]
    each = sum(own[0].nbytes for own in truth)
    where = "conclave.worker.compress.recovery.lessons"
    monkeypatch.setattr(f"{where}.free_memory", lambda device: int(1.5 * (room * each + 8)))
    lessons, made = Lessons(tokens, teachers), 0

    def counted(decoder: Decoder, sequences: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += len(sequences)
        return hidden_states(decoder, sequences)

    monkeypatch.setattr(f"{where}.hidden_states", counted)
    for chosen in ([4, 1], [0, 1, 2], [4, 3], [2, 0, 1, 3, 4]):
        read, theirs, _ = lessons.of(torch.tensor(chosen))
        assert torch.equal(read, tokens[chosen])
        for states, own in zip(theirs, truth, strict=True):
            torch.testing.assert_close(states, own[chosen].flatten(0, 1))
    assert made == 2 * {0: 12, 2: 9, 5: 5}[room]


def test_it_ends_early_with_what_was_best(pair: tuple[Path, Path], tmp_path: Path) -> None:
    schedule = Schedule(steps=40, sequences=4, learning_rate=0.2, looks=40, patience=2)
    looks = recover(pair, tmp_path / "recovered", schedule)
    assert len(looks) < 40
    best = read_manifest(tmp_path / "recovered" / MANIFEST).about["recovery"]["best"]
    assert best["divergence"] == min(look.divergence for look in looks)
    assert looks[-1].step - best["step"] == 2


def test_it_ends_in_time(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Its learning rate falls and its looks are spread over as many steps as there is time for."""
    schedule = Schedule(steps=1_000_000, sequences=4, looks=4, gradual=0.4)
    began, shares = time.monotonic(), list[float]()
    looks = recover(
        pair,
        tmp_path / "recovered",
        schedule,
        told=lambda step, done, look: shares.append(done),
        until=began + 6,
    )
    assert 5 < time.monotonic() - began < 30
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 8
    assert 2 <= len(looks) <= 4 and looks[-1].step == len(shares) and looks[-1].done == 1
    assert schedule.rate(len(shares) - 1, shares[-2]) < schedule.learning_rate / 2


def test_a_shorter_run_still_warms_up() -> None:
    schedule = Schedule(steps=100_000, learning_rate=1.0)
    assert schedule.rate(0, 0.0) == pytest.approx(1 / 5000)
    assert schedule.rate(10, 0.05) == pytest.approx(0.95)
    assert Schedule(steps=100, looks=100).looks_by(0.29) == 29


def test_what_cannot_be(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sequences"):
        recover(pair, tmp_path / "a", Schedule(sequences=64))
    with pytest.raises(ConfigError, match="steps is 0"):
        Schedule(steps=0)
    with pytest.raises(ConfigError, match="adamw, muon"):
        Schedule(optimizer="sgd")
    with pytest.raises(ConfigError, match="weight_decay is -1"):
        Schedule(weight_decay=-1.0)
    for name in ("gradual", "remap"):
        with pytest.raises(ConfigError, match=name):
            Schedule(**{name: 1.5})  # type: ignore[arg-type]
    (tmp_path / "b.training").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="remove it"):
        recover(pair, tmp_path / "b", Schedule(steps=2, sequences=4))


def test_sparsity_rises_to_what_is_asked_for() -> None:
    schedule = Schedule(steps=100, gradual=0.5)
    kept = [schedule.kept(step / 100, 5) for step in range(100)]
    assert kept[0] == 16 and kept == sorted(kept, reverse=True) and kept[49] > 5
    assert set(kept[50:]) == {5}
    assert Schedule(steps=100).kept(0, 5) == 5

"""Bundles of compiled kernels: built without a GPU, always the same, trusted only when whole."""

import json
from pathlib import Path
from zipfile import ZipFile

import pytest
import triton
import triton.language as tl
import typer
from typer.testing import CliRunner

from conclave.kernels.errors import BundleError, KernelInputError, KernelMissing
from conclave.kernels.launching import bundle
from conclave.kernels.launching.loader import Binary, Bundle
from conclave.kernels.launching.targets import ALL, Target, binary_for, ptx_for
from conclave.kernels.launching.variant import Program, Resources, Variant, resources

SHIFT = tl.constexpr(3)


@triton.jit
def _shifted(value):
    return value + SHIFT


@triton.jit
def _add(out, x, other, n, scale, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = _shifted(tl.load(x + place, mask=place < n) * scale)
    if other is not None:
        value += tl.load(other + place, mask=place < n)
    tl.store(out + place, value, mask=place < n)


@triton.jit
def _total(out, x, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)).to(tl.float32)))


@triton.jit
def _sorted(out, x, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, tl.sort(tl.load(x + place)))


ADD = Program(_add, grid="cdiv(n, BLOCK)", multiples_of_16=("n",))
TOTAL = Program(_total)
ADDED = Variant(ADD, ("*bf16", "*bf16", "none", "i32", "fp32"), {"BLOCK": 512}, warps=8)
TOTALLED = Variant(TOTAL, ("*fp32", "*bf16"), {"BLOCK": 1024})
TARGETS = {target.name: target for target in ALL}
BUILT = [TARGETS[name] for name in ("sm_89", "sm_90", "gfx1100")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    path = folder / "bundle.zip"
    bundle.build([ADDED, TOTALLED], BUILT, path, workers=0, folder=folder / "kept")
    return path


def test_manifest_says_what_a_launch_and_a_reader_need(built: Path) -> None:
    archive = Bundle(built)
    assert archive.manifest["triton"] == triton.__version__
    assert set(archive.targets) == {"sm_89", "sm_90", "gfx1100"}
    for target in archive.targets:
        assert set(archive.entries(target)) == {str(ADDED), str(TOTALLED)}
        entry = archive.entries(target)[str(ADDED)]
        assert (entry.kernel, entry.symbol, entry.grid) == ("add", "_add", "cdiv(n, BLOCK)")
        assert [list(each) for each in entry.arguments[1:3]] == [["x", "*bf16"], ["other", "none"]]
        assert entry.constants == {"BLOCK": "512"}
        assert (entry.warps, entry.threads, entry.scratch) == (8, 256, 2)
        assert 4 <= entry.registers <= 64 and not entry.spilled and not entry.stack
        assert archive.entries(target)[str(TOTALLED)].shared > 0
    with pytest.raises(BundleError, match=r"has no sm_42; it has gfx1100, sm_89, sm_90"):
        archive.entries("sm_42")


def test_builds_are_the_same_whoever_compiles_and_where(built: Path, tmp_path: Path) -> None:
    made = bundle.build(
        [TOTALLED, ADDED, ADDED], BUILT[::-1], tmp_path / "again.zip", folder=tmp_path / "kept"
    )
    assert (tmp_path / "again.zip").read_bytes() == built.read_bytes()
    assert sum(each.compiled for each in made) == 6
    kept = bundle.build([ADDED], BUILT, tmp_path / "less.zip", folder=tmp_path / "kept")
    assert sum(each.compiled for each in kept) == 0
    for name in ZipFile(built).namelist():
        content = ZipFile(built).read(name)
        assert str(Path(__file__).parent).encode() not in content, f"{name} knows this checkout"


def test_spills_are_counted(tmp_path: Path) -> None:
    target = TARGETS["sm_90"]
    crowded, easy = (
        Variant(Program(_sorted), ("*fp32", "*fp32"), {"BLOCK": size}, warps=1, options=options)
        for size, options in ((512, {"maxnreg": 24}), (32, {}))
    )
    path = tmp_path / "bundle.zip"
    (made,) = bundle.build([crowded, easy], [target], path, workers=0, folder=tmp_path)
    assert made.spilling == [str(crowded)]
    entry = Bundle(path).entries("sm_90")[str(crowded)]
    assert entry.stack >= 4 * entry.spilled > 0
    assembly = """    .args:
      - .offset:         0
        .value_kind:     global_buffer
    .private_segment_fixed_size: 28
    .sgpr_spill_count: 2
    .vgpr_count:     96
    .vgpr_spill_count: 7
"""
    amd = resources(Binary(b"", "", 64, 0), assembly, TARGETS["gfx942"])
    assert amd == Resources(parameters=1, registers=96, spilled=9, stack=28)


def test_truncated_and_changed_archives_are_refused(built: Path, tmp_path: Path) -> None:
    whole = built.read_bytes()
    broken = tmp_path / "broken.zip"
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        broken.write_bytes(whole[:length])
        with pytest.raises(BundleError, match=r"broken\.zip"):
            Bundle(broken).check()
    for place in range(0, len(whole), len(whole) // 40):
        broken.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            Bundle(broken).check()
        except BundleError as error:
            assert "broken.zip" in str(error)
    with pytest.raises(BundleError, match=r"nowhere\.zip"):
        Bundle(tmp_path / "nowhere.zip")


@pytest.mark.parametrize("member", ["sm_90.json", "binaries/"])
def test_exchanged_members_are_refused(built: Path, tmp_path: Path, member: str) -> None:
    changed = tmp_path / "changed.zip"
    with ZipFile(built) as old, ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + b" " * name.startswith(member))
    with pytest.raises(BundleError, match=r"changed\.zip: .* has been changed"):
        Bundle(changed).find(TARGETS["sm_90"], str(ADDED), ADD.source_hash)


def test_other_formats_are_refused(built: Path, tmp_path: Path) -> None:
    with ZipFile(built) as old, ZipFile(tmp_path / "newer.zip", "w") as new:
        about = json.loads(old.read("manifest.json")) | {"format": 99}
        new.writestr("manifest.json", json.dumps(about))
    with pytest.raises(BundleError, match=r"newer\.zip has format 99"):
        Bundle(tmp_path / "newer.zip")


def test_cards_get_what_they_can_run(built: Path) -> None:
    archive = Bundle(built)

    def kind(card: str) -> str:
        binary, kind = archive.find(Target(card, 0), str(ADDED), ADD.source_hash)
        assert binary.image[:4] == (b"\x7fELF" if kind == "bundle" else b"//\n/")
        return kind

    assert kind("sm_89") == kind("sm_90") == kind("gfx1100") == "bundle"
    assert kind("sm_100") == kind("sm_103") == kind("sm_121") == "ptx"
    for card in ("sm_75", "sm_86", "gfx1101", "gfx942"):
        with pytest.raises(KernelMissing, match=card):
            kind(card)


def test_binaries_run_on_the_same_major_version_only() -> None:
    names = [target.name for target in ALL]
    fits = {"sm_80": "sm_80", "sm_87": "sm_86", "sm_89": "sm_89", "sm_90": "sm_90"}
    fits |= {"sm_100": "sm_100", "sm_120": "sm_120", "gfx1201": "gfx1201"}
    assert {card: binary_for(Target(card, 0), names) for card in fits} == fits
    for card in ("sm_75", "sm_103", "sm_121", "gfx1102", "gfx950"):
        assert binary_for(Target(card, 0), names) is None
    assert ptx_for(Target("sm_121", 0), names) == "sm_89"
    assert ptx_for(Target("sm_75", 0), names) is ptx_for(Target("gfx950", 0), names) is None


def test_variants_that_are_not_there_are_missing(built: Path) -> None:
    archive = Bundle(built)
    other = Variant(ADD, ADDED.types, {"BLOCK": 256})
    with pytest.raises(KernelMissing, match=r"BLOCK=256.* for sm_90"):
        archive.find(TARGETS["sm_90"], str(other), ADD.source_hash)
    with pytest.raises(KernelMissing, match="another source"):
        archive.find(TARGETS["sm_90"], str(ADDED), "0" * 64)


def test_source_hash_covers_what_a_kernel_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed() -> str:
        return Program(_add).source_hash

    first = hashed()
    assert first == hashed() != ADD.source_hash, "a promise about n is part of the program"
    monkeypatch.setitem(_add.fn.__globals__, "SHIFT", tl.constexpr(4))
    assert hashed() != first
    monkeypatch.undo()
    monkeypatch.setitem(_add.fn.__globals__, "_shifted", _total)
    assert hashed() != first


def test_builds_name_what_fails(tmp_path: Path) -> None:
    def build(variants: list[Variant], target: Target) -> None:
        bundle.build(variants, [target], tmp_path / "bundle.zip", workers=0, folder=tmp_path)

    with pytest.raises(BundleError, match=r"total\(.*for sm_90.*shared memory; sm_90 has 0"):
        small = Target("sm_90", 0)
        build([Variant(TOTAL, TOTALLED.types, {"BLOCK": 1024}, targets=(small,))], small)
    with pytest.raises(BundleError, match=r"1 of 1 failed:\ntotal\(.*BLOCK=1000.*for gfx942"):
        build([Variant(TOTAL, TOTALLED.types, {"BLOCK": 1000})], TARGETS["gfx942"])
    with pytest.raises(BundleError, match="two kernels are called total"):
        twin = Variant(Program(_sorted, name="total"), ("*fp32", "*bf16"), {"BLOCK": 1024})
        build([TOTALLED, twin], TARGETS["sm_90"])
    assert not (tmp_path / "bundle.zip").exists()


def test_variants_must_fit_their_kernel() -> None:
    with pytest.raises(KernelInputError, match="takes"):
        Variant(TOTAL, ("*fp32",), {"BLOCK": 1024})
    with pytest.raises(KernelInputError, match="takes"):
        Variant(TOTAL, ("*fp32", "*fp7"), {"BLOCK": 1024})
    with pytest.raises(KernelInputError, match="has the constants"):
        Variant(TOTAL, TOTALLED.types, {"BLOCKS": 1024})
    with pytest.raises(KernelInputError, match="cannot be a"):
        str(Variant(TOTAL, TOTALLED.types, {"BLOCK": object()}))


def test_command_builds_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    only = Variant(TOTAL, TOTALLED.types, TOTALLED.constants, targets=(TARGETS["gfx1100"],))
    monkeypatch.setattr(bundle, "catalogue", lambda: iter([ADDED, only]))
    bundle.main(targets="sm_90,gfx1100", out=Path("out"), workers=0, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == "out/bundle.zip" and said["bytes"] > 0
    assert {each["target"]: each["variants"] for each in said["targets"]} == {
        "sm_90": 1,
        "gfx1100": 2,
    }
    bundle.main(targets="amd", out=Path("out"), workers=2, as_json=False)
    assert "gfx1201" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        bundle.main(targets="sm_42", out=Path("out"), workers=0, as_json=False)
    assert "sm_42" in capsys.readouterr().err


def test_command_refuses_fewer_than_no_workers(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(bundle.main)
    said = CliRunner().invoke(app, ["--workers", "-1", "--out", str(tmp_path)])
    assert said.exit_code == 2 and "workers" in said.output

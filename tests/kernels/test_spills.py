"""The kernels that most time is spent in keep everything in registers."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from conclave.kernels.attention.decode import variants
from conclave.kernels.attention.mma.decode import decode_mma
from conclave.kernels.launching import bundle
from conclave.kernels.launching.loader import Bundle, Entry
from conclave.kernels.launching.targets import ALL, KIB
from conclave.kernels.launching.variant import Variant, compile_variant, resources
from conclave.kernels.layouts import Format
from conclave.kernels.tensor_cores import matmul

pytestmark = pytest.mark.timeout(900)
"""Compiling is what takes the time."""
TARGETS = ("sm_89", "sm_90", "gfx1100", "gfx1201")
WHOLE = ("sm_90", "gfx1201")
"""Compiled for any number of tokens; the others for the most of them alone."""
DECODING = ("unrank", "restore")
"""Of lossless codes."""
BETWEEN = (
    "norm_heads",
    "let_through",
    "normed_sum",
    "choose_experts",
    "dispatch_rows",
    "combine_rows",
)
"""Products."""
INTEGERS = ("integer_product", "to_digits")
EXPECTED = {
    "sm_89": {
        "sparse_gemv",
        "token_pairs",
        "tile_mma",
        "dense_gemv",
        "interleave",
        *DECODING,
        *BETWEEN,
    },
    "sm_90": {
        *{"sparse_gemv", "token_pairs", "tile_wgmma", "dense_gemv", "interleave"},
        *{"tile_persistent", "tile_staged", "arrange", "prefill_wide"},
        *(*DECODING, *BETWEEN, *INTEGERS),
    },
    "gfx1100": {"sparse_gather", "dense_gemv", *DECODING, *BETWEEN},
    "gfx1201": {"sparse_gather", "dense_gemv", *DECODING, *BETWEEN},
}
BESIDE = 12
"""Values that 5:16's programs of eight tokens may keep in memory, where no loop over columns runs
(by Triton 3.7.1; none by 3.6): five of them are to fit a processor."""


def is_hot(variant: Variant) -> bool:
    """Whether it multiplies by 5:16 or dense int4 with wide groups, prepares for it, or attends.

    Or decodes lossless codes, or multiplies integers.
    """
    kept, bits, group = (variant.constants.get(key) for key in ("KEPT", "BITS", "GROUP"))
    if variant.kernel.name == "normed_sum":  # rows of other sizes have as many numbers a thread
        return bool(variant.constants["BLOCK"] == 8192)
    prepares = ("token_pairs", "interleave", "arrange", *DECODING, *BETWEEN, *INTEGERS)
    if variant.kernel.name in (*prepares, "prefill_wide"):
        return True
    if variant.kernel.name == "dense_gemv":
        return bits == 4
    products = {"sparse_gemv", "sparse_gather", "tile_mma"}
    products |= {"tile_wgmma", "tile_persistent", "tile_staged"}
    return (
        variant.kernel.name in products and group == 128 and (kept == 5 or (kept, bits) == (16, 4))
    )


def is_tight(entry: Entry) -> bool:
    """Whether it has fewer registers than it would take."""
    own = {name: str(entry.constants.get(name)) for name in ("KEPT", "TOKENS")}
    return entry.kernel == "tile_wgmma" and own == {"KEPT": "5", "TOKENS": "8"}


def on_whole(variant: Variant) -> Variant:
    """Without the targets that have it for the most tokens alone."""
    targets = tuple(target for target in variant.targets if target.name in WHOLE)
    return replace(variant, targets=targets)


def fullest(variants: Iterable[Variant]) -> list[Variant]:
    """Of those that differ in their tokens alone the one with the most: it has the most registers.

    (dense_gemv on sm_90: 125 for one token, 168 for two; tile_mma on sm_89: 96, 168, 255.)
    """
    most: dict[object, Variant] = {}
    for variant in sorted(variants, key=lambda variant: variant.constants.get("TOKENS", 0)):
        others = dict.fromkeys(variant.constants.keys() & {"TOKENS"}, 0)
        alike = replace(variant, constants={**variant.constants, **others})
        most[str(alike), variant.targets] = variant
    return list(most.values())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("hot")
    hot = [variant for variant in bundle.catalogue() if is_hot(variant)]
    chosen = [*fullest(hot), *map(on_whole, hot)]
    targets = [target for target in ALL if target.name in TARGETS]
    bundle.build(chosen, targets, folder / "bundle.zip", workers=2, folder=folder)
    return Bundle(folder / "bundle.zip")


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(target: str, built: Bundle) -> None:
    entries = built.entries(target)
    assert {entry.kernel for entry in entries.values()} == EXPECTED[target]
    most = {name: BESIDE if is_tight(entry) else 0 for name, entry in entries.items()}
    assert not {
        name: entry.spilled for name, entry in entries.items() if entry.spilled > most[name]
    }
    assert not {
        name: entry.stack for name, entry in entries.items() if entry.stack > 4 * most[name]
    }


def test_three_programs_of_narrow_decode_fit_a_hopper_processor() -> None:
    """Its speed hangs on that (docs/log.md): 228 KiB less one for each, 65,536 registers."""
    (target,) = (each for each in ALL if each.name == "sm_90")
    found = [each for each in variants() if each.kernel is decode_mma]
    own = [each for each in found if each.targets == (target,)]
    assert {each.constants["DIM"] for each in own} == {128, 256, 512}
    for variant in own:
        binary, assembly = compile_variant(variant, target)
        taken = resources(binary, assembly, target)
        assert 3 * (binary.shared + KIB) <= 228 * KIB
        assert 3 * binary.threads * taken.registers <= 65536
        assert taken.spilled <= 16, "a few invariants may be kept in memory, no more"


@pytest.mark.parametrize("format", ["5:16-int4-g128", "5:16-int4-g64", "dense-int4-g128"])
def test_as_many_programs_fit_a_hopper_processor_as_products_are_split_for(format: str) -> None:
    (target,) = (each for each in ALL if each.name == "sm_90")
    own = Format.parse(format)
    plans = {tokens: matmul._plan(own, tokens, True, 8) for tokens in (8, 16, 32, 64)}
    found = [each for each in matmul.variants() if each.targets == (target,)]
    for plan in plans.values():
        (variant,) = (each for each in found if each.constants == plan.constants)
        binary, assembly = compile_variant(variant, target)
        registers = resources(binary, assembly, target).registers
        assert plan.each * (binary.shared + KIB) <= 228 * KIB
        assert plan.each * binary.threads * registers <= 65536
    assert [plan.each for plan in plans.values()][1:] == [4, 3, 2]


@pytest.mark.parametrize("format", ["5:16-int4-g128", "5:16-int4-g64", "8:16-int4-g128"])
def test_as_many_staged_programs_fit_a_hopper_processor_as_are_started(format: str) -> None:
    (target,) = (each for each in ALL if each.name == "sm_90")
    found = [each for each in matmul.variants() if each.targets == (target,)]
    for tokens in matmul.STAGED:
        planned = matmul._staged_plan(Format.parse(format), tokens)
        if planned is None:
            continue
        plan = planned[0]
        (variant,) = (each for each in found if each.constants == plan.constants)
        binary, assembly = compile_variant(variant, target)
        registers = resources(binary, assembly, target).registers
        assert plan.each * (binary.shared + KIB) <= 228 * KIB
        assert plan.each * binary.threads * registers <= 65536

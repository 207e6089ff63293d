"""The kernels that a decode step spends its time in keep everything in registers."""

import pytest

from conclave.kernels.launching import bundle
from conclave.kernels.launching.loader import Bundle
from conclave.kernels.launching.targets import ALL
from conclave.kernels.launching.variant import Variant

TARGETS = ("sm_89", "sm_90", "gfx1100", "gfx1201")
EXPECTED = {
    "sm_89": {"sparse_gemv", "token_pairs", "tile_mma", "dense_gemv", "interleave"},
    "sm_90": {"sparse_gemv", "token_pairs", "tile_wgmma", "dense_gemv", "interleave"},
    "gfx1100": {"sparse_gather", "dense_gemv"},
    "gfx1201": {"sparse_gather", "dense_gemv"},
}


def is_hot(variant: Variant) -> bool:
    """Whether it multiplies by 5:16 or dense int4 with wide groups, or prepares for it."""
    kept, bits, group = (variant.constants.get(key) for key in ("KEPT", "BITS", "GROUP"))
    if variant.kernel.name in ("token_pairs", "interleave"):
        return True
    if variant.kernel.name == "dense_gemv":
        return bits == 4
    products = ("sparse_gemv", "sparse_gather", "tile_mma", "tile_wgmma")
    return (
        variant.kernel.name in products and group == 128 and (kept == 5 or (kept, bits) == (16, 4))
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("hot")
    hot = [variant for variant in bundle.catalogue() if is_hot(variant)]
    targets = [target for target in ALL if target.name in TARGETS]
    bundle.build(hot, targets, folder / "bundle.zip", workers=2, folder=folder)
    return Bundle(folder / "bundle.zip")


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(target: str, built: Bundle) -> None:
    entries = built.entries(target)
    assert {entry.kernel for entry in entries.values()} == EXPECTED[target]
    assert not {name: entry.spilled for name, entry in entries.items() if entry.spilled}
    assert not {name: entry.stack for name, entry in entries.items() if entry.stack}

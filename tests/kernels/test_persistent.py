"""Products by persistent programs: the order of activations, who has which steps."""

import pytest
import torch

from conclave.kernels import tuning
from conclave.kernels.formats import Format
from conclave.kernels.launching.launch import Kernel
from conclave.kernels.tensor_cores import row_pairs, stream_k
from conclave.kernels.tensor_cores.matmul import _persistent_plan
from conclave.kernels.workspace import PARTIALS


@pytest.mark.kernel
@pytest.mark.parametrize("sparse", [False, True])
def test_activations_lie_as_lanes_decode(sparse: bool, device: torch.device) -> None:
    """A block's tokens of 64 columns lie together, zeros behind the last token."""
    x = torch.randn(300, 128).bfloat16().to(device)
    out = torch.full((2, 2, 192, 64), torch.nan, dtype=torch.bfloat16, device=device)
    Kernel(row_pairs.arrange, name="arrange_here", multiples_of_16=("columns",)).launch(
        (out.numel() // 1024,),
        *(out, x, 300, 128),
        constants={"TOKENS": 192, "SPARSE": sparse, "BLOCK": 1024, "OVERLAP": False},
    )
    padded = torch.cat((x, x.new_zeros(84, 128)))
    # From block, token, step, group, half, then i, e, f or, of a sparse weight, f, i, e.
    parts = padded.view(2, 192, 2, 4, 2, 2, 2, 2)
    order = (0, 2, 1, 4, 6, 7, 3, 5) if sparse else (0, 2, 1, 4, 5, 6, 3, 7)
    assert torch.equal(out, parts.permute(order).reshape(out.shape))


@pytest.mark.parametrize(("tiles", "chunks"), [(1, 1), (2, 11), (42, 168), (168, 42), (336, 42)])
@pytest.mark.parametrize("programs", [1, 3, 66, 132])
def test_every_step_has_a_program_and_shares_differ_by_one(
    tiles: int, chunks: int, programs: int
) -> None:
    steps = tiles * chunks
    programs = min(programs, steps)
    shares = [stream_k.share.fn(program, programs, steps) for program in range(programs)]
    assert shares[0][0] == 0 and shares[-1][1] == steps
    sizes = {last - first for first, last in shares}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    for program, (first, last) in enumerate(shares):
        if program:
            assert shares[program - 1][1] == first
        for step in (first, last - 1):
            assert stream_k._program_of.fn(step, programs, steps) == program


@pytest.mark.parametrize("tokens", [65, 129, 192, 193, 256, 257, 385, 1000])
def test_programs_fit_the_workspace(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    each, _ = _persistent_plan(Format.parse("5:16-int4-g128"), tokens)
    blocks = -(-tokens // each)
    monkeypatch.setattr(tuning, "_card", lambda device: ("some card", 132))
    for tiles, chunks in ((1, 1), (168, 42), (2048, 336)):
        programs = tuning.persistent_programs(torch.device("cpu"), tiles, chunks, blocks, each)
        assert 1 <= programs <= tiles * chunks
        assert blocks * programs * 2 * 128 * each <= PARTIALS or programs == 1
    assert tuning.persistent_programs(torch.device("cpu"), 168, 42, 1, 256) == 132

"""Keys and values that went to the host come back while other sequences run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conclave.worker import Engine
from conclave.worker.model.config import CacheGroup
from conclave.worker.running import host_blocks
from conclave.worker.running.host_blocks import HostBlocks
from conclave.worker.scheduling.tier import Moves

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODEL = Path(__file__).parents[2] / "examples" / "models" / "debian-8m-dense"
COUNT, BLOCKS = 48, 96


@pytest.mark.parametrize("buffer", [1 << 20, 1 << 24])
def test_copies_keep_their_order_beside_a_busy_device(
    buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn computes long, then writes over blocks that are going and reads those that came."""
    monkeypatch.setattr(host_blocks, "HOST_BUFFER", buffer)
    device = torch.device("cuda")
    group = CacheGroup(None, (0,), 0)
    keys, values = (
        torch.zeros(BLOCKS, 16, 8, 256, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    host = HostBlocks({0: (keys, values)}, (group,), (COUNT,), device)
    busy = torch.randn(4096, 4096, device=device)
    for turn in range(1, 6):
        goes = [(block, (block + turn) % COUNT) for block in range(COUNT)]
        keys[:COUNT] = turn
        values[:COUNT] = -turn
        for _ in range(20):
            busy = torch.nn.functional.normalize(busy @ busy, dim=1)
        host.exchange([Moves(tuple(goes), ())], wait=False)
        keys[:COUNT] = torch.nan
        comes = [(slot, COUNT + index) for index, (_, slot) in enumerate(goes)]
        host.exchange([Moves((), tuple(comes))], wait=turn % 2 == 0)
        keys[:COUNT] = torch.nan  # beside the copies
        host.exchange([Moves((), ())], wait=False)
        assert (keys[COUNT:] == turn).all() and (values[COUNT:] == -turn).all()
    host.close()


def test_answers_are_the_same_through_the_host() -> None:
    settings: dict[str, Any] = {"device": "cuda", "max_context": 1024, "max_sequences": 16}
    asked = [[number] * (300 + 7 * number) for number in range(5, 25)]

    def run(**more: Any) -> tuple[list[list[int]], Engine]:
        with Engine(MODEL, **settings, **more) as engine:
            answers = []
            for _ in range(2):
                for prompt in asked:
                    stream = engine.stream(prompt, max_tokens=40, temperature=0.0, ignore_eos=True)
                    answers.append(stream.result().token_ids)
            return answers, engine

    roomy, _ = run()
    through, engine = run(kv_tokens=2048, kv_host_gib=1.0)
    assert through == roomy
    assert sum(use.restored for use in engine.load.host) > 0

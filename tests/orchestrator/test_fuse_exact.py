"""Token-level ensembles of real engines, against the same arithmetic on whole forward passes.

The members are the shipped model and two copies with some noise in their weights: three different
models with one tokenizer.
"""

import asyncio
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conclave.orchestrator.client import AsyncClient
from conclave.orchestrator.config import GatewayConfig
from conclave.orchestrator.gateway.server import Gateway
from conclave.orchestrator.routing.registry import WorkerState
from conclave.worker.config import EngineConfig, WorkerConfig
from conclave.worker.model.decoder import DenseAttention
from conclave.worker.serving.server import WorkerServer

SHIPPED = Path(__file__).parents[2] / "examples" / "models" / "debian-8m-dense"
LENGTH = 2


def noisy(folder: Path, seed: int) -> Path:
    """A copy of the shipped model with noise in every matrix."""
    folder.mkdir()
    for path in SHIPPED.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    torch.manual_seed(seed)
    weights = load_file(SHIPPED / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            weights[name] = tensor + 0.3 * tensor.float().std() * torch.randn_like(tensor)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Trio:
    """Three workers, and what their models say of a text."""

    def __init__(self, folder: Path) -> None:
        folders = [SHIPPED, noisy(folder / "a", 1), noisy(folder / "b", 2)]
        self.servers = [
            WorkerServer(
                WorkerConfig(
                    name=f"w{number}",
                    engine=EngineConfig(model=each, device="cpu", threads=1, kv_tokens=8192),
                )
            )
            for number, each in enumerate(folders)
        ]
        self.tokenizer = self.servers[0].engine.model.tokenizer

    @torch.inference_mode()
    def probabilities(self, number: int, ids: Sequence[int]) -> torch.Tensor:
        """Of every next token, float64."""
        model = self.servers[number].engine.model
        decoder = model.runner.decoder
        attention = DenseAttention(decoder.config, [len(ids)])
        hidden = decoder(torch.tensor(ids), torch.arange(len(ids)), attention)
        return decoder.logits(hidden[-1:])[0, : model.vocabulary].double().softmax(-1)

    def rows(self, count: int, ids: Sequence[int]) -> torch.Tensor:
        """Of the first members."""
        return torch.stack([self.probabilities(number, ids) for number in range(count)])


def mean(weights: Sequence[float], rows: torch.Tensor) -> torch.Tensor:
    """Weighted."""
    return torch.tensor(weights, dtype=torch.float64) / sum(weights) @ rows


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", torch.empty)
        trio = Trio(tmp_path_factory.mktemp("trio"))
    yield trio
    for server in trio.servers:
        server.stop()


def prompts(count: int) -> list[str]:
    lines = (SHIPPED / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:: len(lines) // count]][:count]


def members(weights: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"selector": {"names": [f"w{number}"]}, "weight": weight}
        for number, weight in enumerate(weights)
    ]


async def ask(trio: Trio, work: Any) -> None:
    gateway = Gateway(GatewayConfig(port=0))
    await gateway.start()
    for server in trio.servers:
        gateway.located(server.config.name, server.address, server.incarnation)
    async with asyncio.timeout(200), AsyncClient(gateway.address) as client:
        workers = gateway.registry.workers.values()
        while not all(worker.state is WorkerState.SERVING for worker in workers):
            await asyncio.sleep(0.01)
        await work(client)
    await gateway.stop(0.0)
    assert all(worker.open_sequences == 0 for worker in workers)
    while any(server.engine.load.running for server in trio.servers):
        await asyncio.sleep(0.01)
    assert all(pool.used == 0 for server in trio.servers for pool in server.engine.load.pools)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 2.0, 0.5)])
def test_every_token_of_fifty_prompts(trio: Trio, weights: tuple[float, ...]) -> None:
    spec = {"fuse": {"candidates": 8192}, "members": members(weights)}

    async def one(client: AsyncClient, prompt: str) -> None:
        answer = await client.generate(
            prompt, ensemble=spec, temperature=0.0, max_tokens=LENGTH, logprobs=3
        )
        ids = trio.tokenizer.encode(prompt)
        for token in answer.tokens:
            rows = trio.rows(len(weights), ids)
            fused = mean(weights, rows)
            assert token.id == int(fused.argmax())
            assert math.exp(token.logprob or 0) == pytest.approx(float(fused.max()), abs=1e-5)
            best = fused.topk(3)
            assert [c.id for c in token.candidates] == best.indices.tolist()
            told = [math.exp(c.logprob) for c in token.candidates]
            assert told == pytest.approx(best.values.tolist(), abs=1e-5)
            for vote in token.votes:
                own = rows[vote.member]
                assert math.exp(vote.logprob) == pytest.approx(float(own[token.id]), abs=1e-5)
                assert vote.agreed == (int(own.argmax()) == token.id)
            ids.append(token.id)
        assert answer.text == trio.tokenizer.decode([token.id for token in answer.tokens])

    async def work(client: AsyncClient) -> None:
        for prompt in prompts(50):
            await one(client, prompt)

    asyncio.run(ask(trio, work))


def test_streams_its_tokens_and_stops_at_a_stop_text(trio: Trio) -> None:
    spec = {"fuse": {}, "members": members((1.0, 1.0, 1.0))}
    prompt = prompts(1)[0]

    async def work(client: AsyncClient) -> None:
        whole = await client.generate(prompt, ensemble=spec, temperature=0.0, max_tokens=40)
        stream = client.stream(prompt, ensemble=spec, temperature=0.0, max_tokens=40)
        deltas = [delta.text async for delta in stream]
        assert len(deltas) == 40 and "".join(deltas) == whole.text
        stop = whole.text[10:14]
        cut = await client.generate(
            prompt, ensemble=spec, temperature=0.0, max_tokens=40, stop=[stop]
        )
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.finish_reason == "stop" and cut.outputs[0].matched == stop
        assert [m.state for m in cut.ensemble.members] == ["answered"] * 3  # type: ignore[union-attr]

    asyncio.run(ask(trio, work))


def test_mixture_sample_draws_from_the_mean(trio: Trio) -> None:
    weights, draws = (1.0, 2.0, 1.0), 400
    spec = {"mixtureSample": {}, "members": members(weights)}
    prompt = prompts(1)[0]
    fused = mean(weights, trio.rows(3, trio.tokenizer.encode(prompt)))

    async def work(client: AsyncClient) -> None:
        async def one(seed: int) -> int:
            answer = await client.generate(
                prompt, ensemble=spec, temperature=1.0, top_k=0, top_p=1.0, max_tokens=1, seed=seed
            )
            return answer.tokens[0].id

        counts: Counter[int] = Counter()
        for start in range(0, draws, 20):
            counts.update(await asyncio.gather(*(one(start + i) for i in range(20))))
        likely = [int(i) for i in fused.topk(12).indices]
        cells = [(counts[i], float(fused[i])) for i in likely]
        cells.append((draws - sum(n for n, _ in cells), 1 - sum(p for _, p in cells)))
        chi_square = sum((n - draws * p) ** 2 / (draws * p) for n, p in cells)
        assert chi_square < 32.9  # 12 degrees of freedom, p = 0.001

    asyncio.run(ask(trio, work))


def test_a_member_that_is_lost_drops_out_and_comes_back(trio: Trio) -> None:
    spec = {"fuse": {}, "members": members((1.0, 1.0, 1.0)), "quorum": 2}
    prompt, engine = prompts(1)[0], trio.servers[2].engine

    async def work(client: AsyncClient) -> None:
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 240, "ignore_eos": True}
        stream = client.stream(prompt, ensemble=spec, **options)
        tokens: list[Any] = []
        async for delta in stream:
            tokens += delta.tokens
            if len(tokens) == 10:
                for name in list(engine._open):
                    engine.abort(name)
        assert len(tokens) == 240
        took_part = [len(token.votes) for token in tokens]
        assert took_part[:10] == [3] * 10 and 2 in took_part and took_part[-1] == 3
        report = stream.completion.ensemble
        assert report is not None and report.members[2].rejoined == 1

    asyncio.run(ask(trio, work))

"""What is it worth that keys and values go on in host memory, and how fast do they come back?

Conversations with a model of the 26B shape (random weights, int4), many more than its KV cache
holds: each is read once, and goes on when all others have been read. Its blocks are then on the
host. Told is how long it takes until the next token is known, with a host tier and without one,
and at what rate one conversation's blocks come back when nothing else runs. Scheduler, block tables
and runner are the engine's own; tokens are the likeliest ones. Without a tier a few conversations
go on unread, as nothing of them would be left. Given up: tokenizer and callers.

Run it as `python -m benchmarks.spill` on a machine with one NVIDIA card.
"""

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track

from conclave.kernels.formats import Format
from conclave.worker.memory.measured import link_rate
from conclave.worker.memory.shapes import shape_settings
from conclave.worker.model.config import ModelConfig, cache_groups
from conclave.worker.model.decoder import Decoder
from conclave.worker.running.batch import Chunk
from conclave.worker.running.caches import PlainCaches
from conclave.worker.running.host_blocks import HostBlocks
from conclave.worker.running.runner import ModelRunner
from conclave.worker.sampling import SamplingParams
from conclave.worker.scheduling.cache import BlockManager
from conclave.worker.scheduling.scheduler import Scheduler
from conclave.worker.scheduling.sequence import Sequence
from conclave.worker.scheduling.tier import Moves

from .peak import peak_gib, reset_peak
from .random_model import DTYPE, RandomModel
from .records import machine, write_result

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMAT = "dense-int4-g64"
BLOCK, STEP = 16, 2048
"""Tokens of a block, and of a step at most."""
TURN = 16
"""Tokens that a conversation goes on with."""
TINY = {
    **{"hidden_size": 128, "intermediate_size": 128, "vocab_size": 512, "head_dim": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1},
    **{"global_head_dim": 64, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    **{"sliding_window": 32},
}


@dataclass(frozen=True)
class Size:
    """How much is run."""

    conversations: int
    context: int
    """Tokens that each is read with."""
    held: int
    """Of the conversations, how many the cache on the device has room for."""


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--context", type=int, default=32_768, help="tokens of each")
    parser.add_argument("--held", type=int, default=6, help="that fit the device at once")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, anywhere; write no result")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    if not (options.dry or torch.cuda.is_available()):
        raise SystemExit("no GPU; this measures copies to one (or give --dry)")
    given = Size(options.conversations, options.context, options.held)
    figures = measure(Size(6, 200, 2) if options.dry else given, options.dry)
    print(json.dumps(figures, indent=1))
    if not options.dry:
        path = write_result("spill", figures)
        if options.out:
            shutil.copy(path, options.out)


def measure(size: Size, dry: bool) -> dict[str, Any]:
    """All figures."""
    settings = shape_settings("26b", 6 if dry else None) | (TINY if dry else {})
    config = ModelConfig.parse(settings)
    link = 1e10 if dry else link_rate(DEVICE)
    print(f"{machine()}: link {link / 1e9:.1f} GB/s", flush=True)
    decoder = RandomModel(config, None if dry else Format.parse(FORMAT), DEVICE).decoder()
    reset_peak()
    told = {}
    for way, host in (("host", size.conversations), ("recompute", 0)):
        fleet = Conversations(decoder, config, size, host)
        told[way] = fleet.run(config.vocab_size, 2 if way == "recompute" and not dry else None)
        if host:
            told["restore"] = fleet.restored_alone()
        fleet.close()
    same = told["host"]["next"][: len(told["recompute"]["next"])] == told["recompute"]["next"]
    assert same or not dry, "what came back was not what went"
    first = {way: median(told[way]["seconds"]) for way in ("host", "recompute")}
    return {
        "what": "26B shape, random weights, int4; keys and values in bfloat16",
        "conversations": size.conversations,
        "tokens_each": size.context,
        "held_on_the_device": size.held,
        "link_gb_per_s": link / 1e9,
        "restore_gb_per_s": told["restore"]["bytes"] / told["restore"]["seconds"] / 1e9,
        "of_link": told["restore"]["bytes"] / told["restore"]["seconds"] / link,
        "gib_each": told["restore"]["bytes"] / 2**30,
        "next_token_ms": {way: value * 1e3 for way, value in first.items()},
        "times_sooner": first["recompute"] / first["host"],
        "read_tokens_per_s": told["host"]["read_tokens_per_s"],
        "restored_blocks": told["host"]["restored"],
        "peak_gib": peak_gib(),
        "same_tokens": same,
    }


class Conversations:
    """Some of them over one cache, with room on the host for `host` of them."""

    def __init__(self, decoder: Decoder, config: ModelConfig, size: Size, host: int) -> None:
        self.size, groups = size, cache_groups(config)
        longest = size.context + TURN + 2
        blocks = [
            -(-(longest if group.window is None else group.window + STEP) // BLOCK) + 2
            for group in groups
        ]
        held = [count * size.held for count in blocks]
        slots = [count * host for count in blocks] if host else []
        dtype = DTYPE if DEVICE.type == "cuda" else torch.float32
        caches = PlainCaches.empty(config, held, BLOCK, DEVICE, dtype)
        self.host = HostBlocks(caches.tensors, groups, slots, DEVICE) if host else None
        self.runner = ModelRunner(decoder.to(dtype), config, caches, BLOCK, DEVICE, dtype)
        windows = [group.window for group in groups]
        self.blocks = BlockManager(windows, held, BLOCK, True, host=slots)
        self.scheduler = Scheduler(self.blocks, size.held, STEP)
        self.block_bytes = [group.bytes_per_token(dtype.itemsize) * BLOCK for group in groups]

    def run(self, vocabulary: int, most: int | None) -> dict[str, Any]:
        """Read all, then let each go on, one after the other; or only the first `most`, unread."""
        draw = torch.Generator().manual_seed(0)
        shape = self.size.conversations, self.size.context + TURN
        tokens = torch.randint(3, vocabulary, shape, generator=draw).tolist()
        began = time.perf_counter()
        for number in track(range(len(tokens) if most is None else 0), "reading"):
            self.ask(number, tokens[number][: self.size.context])
        read = time.perf_counter() - began
        seconds, found = [], []
        for number in range(len(tokens))[:most]:
            began = time.perf_counter()
            found.append(self.ask(number, tokens[number]))
            seconds.append(time.perf_counter() - began)
        return {
            "seconds": seconds,
            "next": found,
            "read_tokens_per_s": len(tokens) * self.size.context / read,
            "restored": sum(use.restored for use in self.blocks.host_use()),
        }

    def ask(self, number: int, tokens: list[int]) -> int:
        """The likeliest token behind these."""
        sequence = Sequence(
            *(str(number), 0, list(tokens), len(tokens), len(tokens) + 1),
            *(SamplingParams(temperature=0.0), 0, number),
        )
        self.scheduler.add(sequence)
        token = -1
        while sequence.remaining:
            shares = self.scheduler.schedule(time.monotonic())
            chunks = [self.chunk(share.sequence, share.count) for share in shares]
            if self.host is not None:
                self.host.exchange(self.blocks.take_moves(), wait=not self.scheduler.arriving)
            logits = self.runner.forward(chunks)
            for share in shares:
                self.scheduler.commit(share)
            if not sequence.remaining:
                token = int(logits[-1].argmax())
        self.scheduler.finish(sequence)
        return token

    def chunk(self, sequence: Sequence, count: int) -> Chunk:
        """The next `count` tokens."""
        start, end = sequence.computed, sequence.computed + count
        last = int(end == len(sequence.tokens))
        return Chunk(sequence.tokens[start:end], start, sequence.tables, last)

    def restored_alone(self, repeats: int = 5) -> dict[str, float]:
        """Bytes and seconds of one conversation's blocks on their way back."""
        assert self.host is not None
        each = [pool.blocks // self.size.held for pool in self.blocks.pools]
        back = [Moves((), tuple((number, number) for number in range(count))) for count in each]
        self.host.exchange(back, wait=True)
        synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            self.host.exchange(back, wait=True)
        synchronize()
        seconds = (time.perf_counter() - began) / repeats
        return {"bytes": sum(map(mul, each, self.block_bytes)), "seconds": seconds}

    def close(self) -> None:
        """Give the memory back."""
        if self.host is not None:
            self.host.close()
        del self.runner
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

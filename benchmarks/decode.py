"""How fast does an engine decode, and what do CUDA graphs gain?

Models of the 31B and 26B shapes with random weights (speed does not depend on values), whole,
behind the engine's own loop: scheduling, batching, all layers, head, sampling, events. Each
sequence has read a prompt and is answered greedily; plain caches. Once steps are replayed as CUDA
graphs, once the same padded steps are begun kernel by kernel: their tokens must be the same. The
limit is what the bytes of weights and cache that a step reads take at the rate of a copy on the
device, which counts those read and those written.

Run it as `python -m benchmarks.decode` on a card of 80 GB; `--dry` runs small shapes on a CPU.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from conclave.kernels.formats import Format
from conclave.worker.config import EngineConfig
from conclave.worker.loading import LoadedModel
from conclave.worker.loop import EngineLoop
from conclave.worker.memory.shapes import shape_settings
from conclave.worker.model.config import CacheGroup, ModelConfig, cache_groups
from conclave.worker.model.decoder import Decoder
from conclave.worker.model.storage import Storage, storage_of
from conclave.worker.requests.completion import Stream
from conclave.worker.requests.intake import Intake
from conclave.worker.requests.limits import Limits
from conclave.worker.running.caches import PlainCaches
from conclave.worker.running.graphs import GraphRecorder
from conclave.worker.running.replayed import Record, Replaying
from conclave.worker.running.runner import ModelRunner
from conclave.worker.scheduling.sizing import plan_cache
from conclave.worker.text.tokenizer import Tokenizer
from conclave.worker.weights import blank_decoder

from .clock import copy_rate
from .measurements import release
from .peak import peak_gib, reset_peak
from .random_model import DTYPE, RandomModel
from .records import HEADLINE as HEADLINE_FILE
from .records import machine, write_headline, write_result
from .rows import Row

MODELS = Path(__file__).parents[1] / "examples" / "models"
TOKENIZER = MODELS / "debian-8m"
CASES = (("31b", "5:16-int4-g128", (1, 8, 32)), ("26b", "dense-int4-g64", (1, 8)))
PROMPT, ANSWER, WARM = 1100, 160, 8
"""Tokens; the first of an answer are not timed: they load kernels and are recorded."""
TINY = {
    **{"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "global_head_dim": 64},
    **{"vocab_size": 8192, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_global_key_value_heads": 1, "sliding_window": 16},
}
TINY_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}


def main() -> None:
    """Measure, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="small shapes on a CPU; write nothing")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    if not (options.dry or torch.cuda.is_available()):
        raise SystemExit("no card; give --dry to try it on a CPU")
    figures = measure(options.dry)
    if not options.dry:
        path = write_result("decode", figures)
        print(f"written: {path}")
        if options.out is not None:
            for each in (path, HEADLINE_FILE):
                shutil.copy(each, options.out)


def measure(dry: bool) -> dict[str, Any]:
    """All figures."""
    rate = 0.0 if dry else copy_rate().median
    print(f"{machine()}: a copy reads and writes {rate:.0f} GB/s")
    rows = []
    for name, format, batches in CASES:
        source = source_of(name, format, dry)
        decoder = source.decoder()
        source.forget()
        for batch in batches:
            rows.append(row_of(name, source, decoder, batch, rate, dry))
            print(rows[-1], flush=True)
        del decoder, source
        release()
    return {"copy_gb_per_s": rate, "prompt_tokens": PROMPT, "rows": rows}


def source_of(name: str, format: str, dry: bool) -> RandomModel:
    """A model of a shape that has a name, or one that is like it."""
    tiny = TINY | (TINY_EXPERTS if name == "26b" else {})
    config = ModelConfig.parse(shape_settings(name, 6 if dry else None) | (tiny if dry else {}))
    own = Format.parse(format.replace("g128", "g64") if dry else format)
    return RandomModel(config, own, torch.device("cpu" if dry else "cuda"))


def row_of(
    name: str, source: RandomModel, decoder: Decoder, batch: int, rate: float, dry: bool
) -> Row:
    """So many sequences, both ways."""
    reset_peak()
    blank = blank_decoder(source.config)
    storage = storage_of(blank, source.formats(), DTYPE, packed=True)

    def run(record: Record) -> tuple[list[list[int]], list[float]]:
        model, config = loaded(source, storage, decoder, batch, record)
        return answer(model, config, 5 if dry else PROMPT, 6 if dry else ANSWER)

    graphs: Record = repeated if dry else GraphRecorder(source.device)
    tokens, seconds = run(graphs)
    gib = peak_gib()
    del graphs
    release()  # two caches have no room beside each other
    same, begun = run(repeated)
    release()
    assert tokens == same, "replayed steps must give the same tokens"
    step, low, high = median(seconds), min(seconds), max(seconds)
    limit = limit_seconds(source.config, storage, batch, rate)
    if (name, batch) == ("31b", 1) and not dry:
        write_headline("b31_rate", 1 / step, "tokens/s", (1 / high, 1 / low))
        write_headline("b31_limit_fraction", limit / step, "fraction", (limit / high, limit / low))
        write_headline("b31_process_gib", gib, "GiB", (gib, gib))
    if (name, batch) == ("26b", 1) and not dry:
        write_headline("b26_rate", 1 / step, "tokens/s", (1 / high, 1 / low))
    return {
        **{"model": name, "format": str(source.format), "batch": batch},
        **{"tokens_per_s": batch / step, "ms": step * 1e3, "low": low * 1e3, "high": high * 1e3},
        **{"limit_ms": limit * 1e3, "of_limit": limit / step},
        **{"begun_one_by_one_ms": median(begun) * 1e3, "peak_gib": gib},
    }


def repeated(run: Callable[[], None]) -> Callable[[], None]:
    """In place of a recording: each time it is begun kernel by kernel."""
    return run


def loaded(
    source: RandomModel,
    storage: Storage,
    decoder: Decoder,
    batch: int,
    record: Record,
) -> tuple[LoadedModel, EngineConfig]:
    """As `load_model` would return it, with a tokenizer that is not the model's."""
    config, device = source.config, source.device
    longest = PROMPT + ANSWER
    settings = EngineConfig(
        model=TOKENIZER,
        max_context=longest,
        max_sequences=batch,
        kv_tokens=batch * (longest + 32),
        prefix_cache=False,
    )
    groups = cache_groups(config)
    sizes = [group.bytes_per_token(DTYPE.itemsize) for group in groups]
    cache = plan_cache(settings, groups, config.max_position_embeddings, sizes, 0)
    caches = PlainCaches.empty(config, cache.blocks, settings.block_size, device, DTYPE)
    runner = ModelRunner(
        *(decoder, config, caches, settings.block_size, device, DTYPE),
        replaying=Replaying(record, batch, longest),
    )
    model = LoadedModel(
        *(config, runner, Tokenizer(TOKENIZER), cache, storage, storage.precision),
        *(tuple(group.window for group in groups), device, DTYPE, 0, "random"),
    )
    return model, settings


def answer(
    model: LoadedModel, config: EngineConfig, prompt: int, length: int
) -> tuple[list[list[int]], list[float]]:
    """Each sequence's tokens, and the seconds of steps in which all of them decode."""
    loop = EngineLoop(model, config, lambda _: None)
    limits = Limits.of(config, model.vocabulary, model.cache.max_context, model.precision)
    intake = Intake(model.tokenizer, limits)
    draw = torch.Generator().manual_seed(0)
    streams = []
    for _ in range(config.max_sequences):
        ids = torch.randint(3, 8000, (prompt,), generator=draw).tolist()
        streams.append(Stream(lambda: None))
        fields = {"temperature": 0.0, "max_tokens": length, "ignore_eos": True}
        loop.accept(intake.generation(ids, fields, streams[-1].put), time.monotonic())
    seconds = []
    while loop.pause() == 0:
        before, began = loop.state().completion_tokens, time.perf_counter()
        loop.turn()
        loop.deliver()
        spent = time.perf_counter() - began
        if loop.state().completion_tokens - before == config.max_sequences:
            seconds.append(spent)
    return [stream.result().token_ids for stream in streams], seconds[min(WARM, length // 2) :]


def limit_seconds(config: ModelConfig, storage: Storage, batch: int, rate: float) -> float:
    """What reading takes at `rate` GB/s: layers, embeddings as the head, keys and values."""
    layers = zip(config.layers, storage.layers, strict=True)
    weights = storage.rest + sum(own.read(batch, layer.experts) for layer, own in layers)
    cache = sum(_cached(group) for group in cache_groups(config)) * batch
    return (weights + cache) / (rate * 1e9) if rate else 0.0


def _cached(group: CacheGroup) -> float:
    """Bytes that one sequence reads of a group's cache, halfway through its answer."""
    seen = PROMPT + ANSWER / 2
    return group.bytes_per_token(2) * (seen if group.window is None else min(seen, group.window))


if __name__ == "__main__":
    main()

"""What does streaming weights from the host cost, and what does prefetch gain?

Models of real shape with random weights run under a budget, every layer that does not fit copied
from locked host memory at every step. Each row has two ceilings of the same run: computing alone,
with all layers resident, and copying alone, at the rate measured. Each step is one CUDA graph; what
it takes where the host begins each kernel by itself is told beside it. Decoding is one token of
each sequence, prompts are sequences of 64. Attention sees only the tokens of the step: no cache is
read, but memory is set aside for one.

Where layers have a shorter code, they run with that, as engines do; `--plain` runs the same without
it too. What prefetch gains, where computing takes as long as copying, is about copies alone: there
layers are plain, with prefetch and on demand.

Run it as `python -m benchmarks.offload` on a machine with one NVIDIA card; `--rows` chooses.
"""

import argparse
import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from conclave.kernels.formats import Format
from conclave.worker.memory.measured import link_rate
from conclave.worker.memory.residency import Residency, choose, choose_coded
from conclave.worker.memory.shapes import shape_settings
from conclave.worker.memory.streaming.coded import stream_of
from conclave.worker.memory.streaming.layers import LayerStream
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.storage import Storage, storage_of
from conclave.worker.weights import blank_decoder

from . import accelerated
from .offload_settings import BALANCE, SETTINGS, Setting
from .peak import GIB, peak_gib, reset_peak
from .random_model import DTYPE, RandomModel
from .records import HEADLINE as HEADLINE_FILE
from .records import machine, write_headline, write_result

# Before torch touches the GPU: segments that grow, or layers that were freed leave holes behind.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

AHEAD = 2
LENGTH = 64
"""Tokens of a prompt's sequence."""
CONTEXT = 0.8
"""GiB set aside for the driver and loaded kernels; `peak_gib` says whether it was enough."""
CACHE = 0.5
"""GiB set aside for keys and values: 4,096 tokens of the 31B model in narrow numbers at 1 %."""
REPEATS = 9
EAGER_REPEATS = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = {
    **{"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1},
    **{"head_dim": 32, "global_head_dim": 64},
}
TINY_LAYERS = 12
Row = dict[str, Any]


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--rows", nargs="+", choices=[*names, "accelerate"], help="all by default")
    parser.add_argument("--plain", action="store_true", help="decode without codes as well")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, anywhere; write no result")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    if not (options.dry or torch.cuda.is_available()):
        raise SystemExit("no GPU; this measures copies to one (or give --dry)")
    figures = measure(options.rows or [*names, "accelerate"], options.dry, options.plain)
    if options.dry:
        print(json.dumps(figures, indent=1))
        return
    save(figures, options.out)


def measure(names: Sequence[str], dry: bool, plain: bool = False) -> dict[str, Any]:
    """All figures."""
    link = 1e10 if dry else link_rate(DEVICE)
    print(f"{machine()}: link {link / 1e9:.1f} GB/s", flush=True)
    rows: list[Row] = []
    chosen = [each for each in SETTINGS if each.name in names]
    for formats in dict.fromkeys((each.format, each.tables) for each in chosen):
        own = [each for each in chosen if (each.format, each.tables) == formats]
        rows += rows_of(own, link, dry, plain)
    figures: dict[str, Any] = {
        "what": "31B shape, random weights; embeddings as told, in bfloat16 where layers are",
        "link_gb_per_s": link / 1e9,
        "rows": rows,
    }
    if "accelerate" in names and not dry:
        figures["accelerate"] = against(ours(rows))
    return figures


def rows_of(settings: Sequence[Setting], link: float, dry: bool, plain: bool) -> Iterator[Row]:
    """All settings of equal formats; layers that stay are measured once for all."""
    shape = shape_settings("31b", TINY_LAYERS if dry else None) | (TINY if dry else {})
    format, tables = settings[0].format, Format.parse(settings[0].tables)
    own = None if format is None else Format.parse(format)
    source = RandomModel(ModelConfig.parse(shape), own, DEVICE, tables)
    steps = {step for each in settings for step in steps_of(each, dry)}
    resident = source.decoder()
    bests = {step: Timed(resident, *step) for step in sorted(steps)}
    del resident
    clear()
    for setting in settings:
        began = time.perf_counter()
        yield from under(source, setting, bests, link, dry, plain)
        print(f"{setting.name}: {time.perf_counter() - began:.0f} s", flush=True)


def steps_of(setting: Setting, dry: bool) -> list[tuple[int, int]]:
    """(sequences, tokens of each)."""
    if dry:
        return [(1, 1), (2, 8)]
    prompts = ((tokens // LENGTH, LENGTH) for tokens in setting.prefill)
    return [*((batch, 1) for batch in setting.decode), *prompts]


def under(
    source: RandomModel,
    setting: Setting,
    bests: dict[tuple[int, int], "Timed"],
    link: float,
    dry: bool,
    plain: bool,
) -> Iterator[Row]:
    """The rows of one setting."""
    storage = storage_of(blank_decoder(source.config), source.formats(), DTYPE, packed=True)
    found: dict[tuple[str, tuple[int, int]], Row] = {}
    for way in ways_of(storage, setting, plain):
        residency = residency_of(storage, setting, way, dry)
        if not residency.streamed:
            print(f"{setting.name}: everything fits")
            return
        ballast = torch.empty(0 if dry else int(CACHE * GIB), dtype=torch.uint8, device=DEVICE)
        stream = stream_of(residency, DEVICE, prefetch=way != "on demand")
        decoder = source.decoder(stream)
        source.forget()
        clear()
        for step in steps_of(setting, dry):
            reset_peak()
            timed = Timed(decoder, *step, stream)
            row = row_of(setting, way, step, timed, bests[step], stream, link)
            found[way, step] = row
            demand, ahead_row = found.get(("on demand", step)), found.get(("prefetch", step))
            if demand and ahead_row:
                demand["gain"] = demand["ms"] / ahead_row["ms"]
            print(" ".join(f"{key} {short(value)}" for key, value in row.items()), flush=True)
        stream.close()
        del decoder, stream, ballast
        clear()
    yield from found.values()


def ways_of(storage: Storage, setting: Setting, plain: bool) -> tuple[str, ...]:
    """How layers come: each copied as it is, in a shorter code, or not before it is needed."""
    coded = ("coded",) if any(each.coded < each.block for each in storage.layers) else ()
    if setting.name in BALANCE:
        return "prefetch", "on demand"
    return (*coded, "prefetch") if plain or not coded else coded


def residency_of(storage: Storage, setting: Setting, way: str, dry: bool) -> Residency:
    """The layers that the budget streams."""
    blocks = [layer.block for layer in storage.layers]
    fixed = storage.rest + int((CONTEXT + CACHE + setting.scratch) * GIB)
    budget = sum(blocks) // 2 if dry else int(setting.gib * GIB) - fixed
    if way == "coded":
        coded = [layer.coded_modules for layer in storage.layers]
        found = choose_coded(blocks, coded, storage.largest_module, budget, AHEAD)
    else:
        found = choose(blocks, budget, 0 if way == "on demand" else AHEAD)
    assert found is not None, f"{setting.name} does not fit"
    return found


class Timed:
    """Milliseconds of a step, as a graph and without one, and its logits."""

    def __init__(
        self, decoder: Decoder, sequences: int, length: int, stream: LayerStream | None = None
    ) -> None:
        count = sequences * length
        tokens = (torch.arange(count, device=DEVICE) * 7919 + 3) % decoder.config.vocab_size
        positions = torch.arange(count, device=DEVICE) % length
        logits = torch.empty(0)

        @torch.inference_mode()
        def run() -> None:
            nonlocal logits
            attention = DenseAttention(decoder.config, [length] * sequences)
            hidden = decoder(tokens, positions, attention)
            logits = decoder.logits(hidden[length - 1 :: length])

        self.eager_ms = median(seconds(run, 1) * 1e3 for _ in range(EAGER_REPEATS))
        work = recorded(run, stream) if DEVICE.type == "cuda" else run
        self.times = [seconds(work) * 1e3 for _ in range(REPEATS)]
        self.ms = median(self.times)
        self.logits = logits.cpu()


def recorded(run: Callable[[], None], stream: LayerStream | None) -> Callable[[], None]:
    """As one CUDA graph, which the host does not slow down."""
    run()
    clear()  # a graph has memory of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        if stream is not None:
            stream.before_replay()
        graph.replay()

    return replay


def seconds(work: Callable[[], None], times: int = 2) -> float:
    """Of one call, of several in a row after one that fills the pipe."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def row_of(
    setting: Setting,
    way: str,
    step: tuple[int, int],
    timed: Timed,
    best: Timed,
    stream: LayerStream,
    link: float,
) -> Row:
    """One setting, way and step."""
    tokens, residency = step[0] * step[1], stream.residency
    copied = stream.use().host_bytes  # codes may take less than was planned
    copies = copied / link * 1e3
    bound = max(best.ms, copies)
    return {
        "format": setting.format or "bfloat16",
        "tables": setting.tables if setting.format else "bfloat16",
        "gib": setting.gib,
        "way": way,
        "step": f"{step[0]} x {step[1]}",
        "streamed": f"{len(residency.streamed)} of {len(residency.blocks)}",
        "copied_gib": copied / GIB,
        "compute_ms": best.ms,
        "copy_ms": copies,
        "ms": timed.ms,
        "low": min(timed.times),
        "high": max(timed.times),
        "eager_ms": timed.eager_ms,
        "of_bound": bound / timed.ms,
        "link_gb_per_s": copied / timed.ms / 1e6,
        "tokens_per_s": tokens / timed.ms * 1e3,
        "peak_gib": peak_gib(),
        "same": torch.equal(timed.logits, best.logits),
        "gain": "",
    }


def against(rows: Sequence[Row]) -> list[Row]:
    """accelerate in bfloat16 under the same budgets, beside our rows of one token a sequence."""
    settings = shape_settings("31b", 6)
    blank = blank_decoder(ModelConfig.parse(shape_settings("31b")))
    storage = storage_of(blank, {}, DTYPE, packed=True)
    largest = max(layer.block for layer in storage.layers)
    found: dict[int, accelerated.Offloaded] = {}
    compared = []
    for row in rows:
        batch, length = map(int, row["step"].split(" x "))
        if length > 1:
            continue
        if batch not in found:
            found[batch] = accelerated.measure(settings, batch)
            clear()
        room = row["gib"] * GIB - storage.rest - (CONTEXT + CACHE) * GIB
        stay = max(0, int(room // largest) - 1)  # one is on its way
        step = found[batch].step(60, 60 - stay)
        compared.append(
            {
                **{key: row[key] for key in ("format", "gib", "step", "tokens_per_s")},
                "accelerate_tokens_per_s": batch / step,
                "times": row["tokens_per_s"] * step / batch,
            }
        )
        print(compared[-1], flush=True)
    return compared


def save(figures: dict[str, Any], out: Path | None) -> None:
    """Write the result and, if no row is at fault, the headline figures that this script owns.

    Which row a figure is of follows from its ceilings, never from how it came out.
    """
    rows = figures["rows"]
    written = [write_result("offload", figures), HEADLINE_FILE]
    if faults := [row for row in rows if not row["same"] or row["peak_gib"] > row["gib"]]:
        print(f"no headline figures: {len(faults)} rows with other tokens or over their budget")
    else:
        headlines(rows, figures.get("accelerate", ()))
    for path in written:
        print(f"written: {path}")
        if out is not None:
            shutil.copy(path, out)


def headlines(rows: Sequence[Row], compared: Sequence[Row]) -> None:
    """Those whose rows were measured."""
    if pairs := pairs_of(rows):
        ahead, demand = min(pairs, key=lambda pair: unevenness(pair[0]))
        spread = demand["low"] / ahead["ms"], demand["high"] / ahead["ms"]
        write_headline("prefetch_gain", demand["gain"], "ratio", spread)
    fractions = [row["of_bound"] for row in rows if row["way"] != "on demand"]
    if fractions:
        write_headline(
            "overlap_fraction", min(fractions), "fraction", (min(fractions), max(fractions))
        )
    first = SETTINGS[0].format, SETTINGS[0].gib, "coded", "1 x 1"
    for row in rows:
        if (row["format"], row["gib"], row["way"], row["step"]) == first:
            slower, faster = row["ms"] / row["high"], row["ms"] / row["low"]
            for name, key, unit in (
                ("b31_8gib_rate", "tokens_per_s", "tokens/s"),
                ("link_rate", "link_gb_per_s", "GB/s"),
            ):
                write_headline(name, row[key], unit, (row[key] * slower, row[key] * faster))
    if times := [row["times"] for row in compared]:
        write_headline("vs_accelerate", min(times), "ratio", (min(times), max(times)))


def ours(rows: Sequence[Row]) -> list[Row]:
    """Those that run as an engine would: with prefetch, and coded where that was run."""
    same = ("format", "gib", "step")
    coded = [[row[key] for key in same] for row in rows if row["way"] == "coded"]
    plain = (row for row in rows if row["way"] == "prefetch")
    others = [row for row in plain if [row[key] for key in same] not in coded]
    return [row for row in rows if row["way"] == "coded"] + others


def pairs_of(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """With prefetch and on demand, of each step that was run both ways."""
    same = ("format", "gib", "step")
    ahead = {tuple(row[key] for key in same): row for row in rows if row["way"] == "prefetch"}
    demand = [row for row in rows if row["way"] == "on demand"]
    return [(ahead[tuple(row[key] for key in same)], row) for row in demand]


def unevenness(row: Row) -> float:
    """How far a row is from the balance point, where computing and copying take equally long."""
    return abs(math.log(row["compute_ms"] / row["copy_ms"]))


def clear() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def short(value: object) -> str:
    """For a line on the screen."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()

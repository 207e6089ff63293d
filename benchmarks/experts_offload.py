"""What does it cost to keep experts on the host, as many in slots as 8 GiB allow?

The 26B shape in dense int4 with random weights decodes along a drawn trace of choices
(`expert_traces`), which replaces the router's: resident, with experts fetched on demand, and with
those of the next layer foreseen, of which 85 % are right and the others near misses. Each way is
one CUDA graph of a step, replayed token after token; the first tokens fill the slots and do not
count. Attention sees only the tokens of the step: no cache is read, but memory is set aside for
one. Beside it, without a GPU, hit rates of the policy against LRU and Belady, of that trace and of
the shipped model's own.

Run it as `python -m benchmarks.experts_offload` on a machine with one NVIDIA card.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from conclave.kernels.experts.ops import choose
from conclave.kernels.formats import Format
from conclave.worker.memory.experts.cache import ExpertCache, ExpertUse
from conclave.worker.memory.experts.module import SlottedExperts
from conclave.worker.memory.experts.slots import ExpertSlots, choose_slots, fewest_slots
from conclave.worker.memory.measured import link_rate
from conclave.worker.memory.shapes import shape_settings
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder, DenseAttention
from conclave.worker.model.layers import Experts
from conclave.worker.model.storage import storage_of
from conclave.worker.weights import blank_decoder

from .expert_traces import FLAT, STAYS, STEEP, Row, drawn, foreseen, rates, shipped
from .offload import CACHE, CONTEXT, DEVICE, clear, short
from .peak import GIB, peak_gib, reset_peak
from .random_model import DTYPE, RandomModel
from .records import HEADLINE as HEADLINE_FILE
from .records import machine, write_headline, write_result

FORMAT = "dense-int4-g64"
BUDGET = 8.0
"""GiB."""
SCRATCH = 0.4
"""GiB set aside for a step."""
RIGHT = 0.85
"""Of the experts that are foreseen."""
GOAL_SHARE = 0.38
"""Of the experts in slots, for which there is a goal for how often they are found: 0.92."""
BATCHES = (1, 8)
WAYS = {"on demand": False, "foreseen": True}
EAGER = 2
"""Steps before one is recorded."""
COMPARED = 40
"""Steps apart whose logits are compared."""
TINY = {
    **{"hidden_size": 256, "intermediate_size": 256, "vocab_size": 512},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1},
    **{"head_dim": 32, "global_head_dim": 64},
    **{"num_experts": 16, "top_k_experts": 2, "moe_intermediate_size": 64},
}


@dataclass(frozen=True)
class Length:
    """How many steps of the trace are run."""

    warm: int
    """That fill the slots, and do not count."""
    segments: int
    """Timed each by itself."""
    each: int

    @property
    def steps(self) -> int:
        return self.warm + self.segments * self.each


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--warm", type=int, default=300, help="tokens that fill the slots")
    parser.add_argument("--segments", type=int, default=9, help="of tokens, timed one by one")
    parser.add_argument("--each", type=int, default=50, help="tokens of a segment")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, anywhere; write no result")
    parser.add_argument("--out", type=Path, help="a folder that gets a copy of what is written")
    options = parser.parse_args()
    if not (options.dry or torch.cuda.is_available()):
        raise SystemExit("no GPU; this measures fetches to one (or give --dry)")
    length = Length(options.warm, options.segments, options.each)
    length = Length(4, 2, 6) if options.dry else length
    figures = measure(length, options.dry)
    if options.dry:
        print(json.dumps(figures, indent=1))
        return
    save(figures, options.out)


def measure(length: Length, dry: bool) -> dict[str, Any]:
    """All figures."""
    link = 1e10 if dry else link_rate(DEVICE)
    print(f"{machine()}: link {link / 1e9:.1f} GB/s", flush=True)
    settings = shape_settings("26b", 4 if dry else None) | (TINY if dry else {})
    source = RandomModel(ModelConfig.parse(settings), Format.parse(FORMAT), DEVICE)
    slots = slots_of(source, dry)
    routes = {batch: Routing(source.config, batch, length.steps) for batch in BATCHES}
    resident = source.decoder()
    bests = {batch: Run(resident, own, length) for batch, own in routes.items()}
    del resident
    source.forget()
    clear()
    rows = [{"batch": own.batch, "way": "resident", **own.speed()} for own in bests.values()]
    on_card = DEVICE.type == "cuda"
    ballast = torch.empty(int(CACHE * GIB) if on_card else 0, dtype=torch.uint8, device=DEVICE)
    cache = ExpertCache(slots, DEVICE, predict=True, poison=not on_card)
    began = time.perf_counter()
    decoder = source.decoder(cache)
    source.forget()
    print(f"experts on the host after {time.perf_counter() - began:.0f} s", flush=True)
    for batch, routing in routes.items():
        for way in WAYS:
            rows.append(row_of(decoder, cache, way, routing, bests[batch], length))
            print(" ".join(f"{key} {short(value)}" for key, value in rows[-1].items()), flush=True)
    cache.close()
    del decoder, ballast
    clear()
    return {
        "what": f"26B shape in {FORMAT}, random weights, embeddings in int8; choices drawn: "
        f"popularity (rank + {FLAT})^-{STEEP:g}, {STAYS:g} stay, {RIGHT:g} foreseen rightly, "
        "else one that came next in the draw",
        "link_gb_per_s": link / 1e9,
        "budget_gib": BUDGET,
        "slots": slots.slots,
        "share": slots.share,
        "slot_bytes": slots.expert_bytes,
        "rows": rows,
        "policy": [
            replayed(own, each, length) for own in routes.values() for each in (slots, fewer(slots))
        ],
        "shipped": shipped(*((2, 60) if dry else (20, 2000))),
    }


def slots_of(source: RandomModel, dry: bool) -> ExpertSlots:
    """Those that the budget leaves room for."""
    storage = storage_of(blank_decoder(source.config), source.formats(), DTYPE, packed=True)
    if dry:
        least = fewest_slots(storage.layers)
        assert least is not None
        return ExpertSlots(least.layers, least.experts, 24, least.parts)
    fixed = storage.rest + int((CONTEXT + CACHE + SCRATCH) * GIB)
    found = choose_slots(storage.layers, int(BUDGET * GIB) - fixed)
    assert found is not None, "no room for one layer's experts"
    return found


def fewer(slots: ExpertSlots) -> ExpertSlots:
    """For the share of the experts that the hit rate's goal is about."""
    return replace(slots, slots=round(GOAL_SHARE * len(slots.layers) * slots.experts))


def replayed(routing: "Routing", slots: ExpertSlots, length: Length) -> Row:
    """The policy on this trace; of several sequences a shorter part of it."""
    most = length.steps if routing.batch == 1 else length.warm + length.each
    played = routing.trace[:most], slots.experts, slots.slots, length.warm
    chosen = {"batch": routing.batch, "slots": slots.slots, "share": slots.share}
    return chosen | rates(*played, routing.guessed[:most])


class Routing:
    """A trace in place of the routers' choices: at each step all layers look their own up."""

    def __init__(self, config: ModelConfig, batch: int, steps: int) -> None:
        kind = config.layers[0].experts
        assert kind is not None
        self.trace, following = drawn(steps, len(config.layers), kind.count, kind.active, batch)
        self.guessed = foreseen(self.trace, following, RIGHT)
        self._chosen = self.trace.transpose(0, 1).contiguous().to(DEVICE)
        self._foreseen = self.guessed.transpose(0, 1).contiguous().to(DEVICE)
        self._step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        self.batch = batch

    def begin(self) -> None:
        """At the first token."""
        self._step.zero_()

    def advance(self) -> None:
        """To the next."""
        self._step.add_(1)

    @contextmanager
    def forced(self, decoder: Decoder) -> Iterator[None]:
        """Let a decoder's experts be those of the trace; the routers compute as ever."""
        places = {
            id(own): place
            for place, own in enumerate(each for each in decoder.modules() if _routes(each))
        }

        def route(module: Experts, residual: Tensor) -> tuple[Tensor, Tensor]:
            weights, _ = choose(module.scores(residual), module.expert_scale, module.active)
            # Weights of other experts do: nothing hangs on them here but the values.
            return weights, self._chosen[places[id(module)]].index_select(0, self._step)[0]

        def foresee(module: SlottedExperts, residual: Tensor) -> Tensor:
            choose(module.scores(residual), module.expert_scale, module.active)
            return self._foreseen[places[id(module)]].index_select(0, self._step)[0]

        with (
            patch.object(Experts, "route", route),
            patch.object(SlottedExperts, "foresee", foresee),
        ):
            yield


def _routes(module: torch.nn.Module) -> bool:
    return isinstance(module, Experts)


class Run:
    """A decoder along a trace: seconds of each segment, and logits now and then."""

    def __init__(
        self, decoder: Decoder, routing: Routing, length: Length, cache: ExpertCache | None = None
    ) -> None:
        self._each = length.each
        self.batch = batch = routing.batch
        config = decoder.config
        tokens = (torch.arange(batch, device=DEVICE) * 7919 + 3) % config.vocab_size
        positions = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        logits = torch.empty(0)

        @torch.inference_mode()
        def run() -> None:
            nonlocal logits
            logits = decoder.logits(decoder(tokens, positions, DenseAttention(config, [1] * batch)))
            routing.advance()

        self.logits: list[Tensor] = []
        self.seconds: list[float] = []
        routing.begin()
        with routing.forced(decoder):
            for _ in range(EAGER):
                run()
            step = recorded(run, cache) if DEVICE.type == "cuda" else run
            for number in range(EAGER, length.warm):
                step()
                if number % COMPARED == 0:
                    self.logits.append(logits.cpu())
            self.before = None if cache is None else cache.use()
            for _ in range(length.segments):
                self.seconds.append(timed(step, length.each))
                self.logits.append(logits.cpu())
        self.after = None if cache is None else cache.use()

    def speed(self) -> Row:
        """Tokens a second: the median, the lowest and the highest of the segments."""
        own = [self.batch * self._each / each for each in self.seconds]
        return {"tokens_per_s": median(own), "low": min(own), "high": max(own)}


def recorded(run: Callable[[], None], cache: ExpertCache | None) -> Callable[[], None]:
    """As one CUDA graph, which the host does not slow down."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        if cache is not None:
            cache.before_replay()
        graph.replay()

    return replay


def timed(step: Callable[[], None], count: int) -> float:
    """Seconds of so many steps."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row_of(
    decoder: Decoder, cache: ExpertCache, way: str, routing: Routing, best: Run, length: Length
) -> Row:
    """One way and batch; what the slots hold from before is gone after the warm steps."""
    cache.predict = WAYS[way]
    clear()
    reset_peak()
    run = Run(decoder, routing, length, cache)
    assert run.before is not None and run.after is not None
    own = run.speed()
    return {
        **{"batch": run.batch, "way": way, **own},
        "of_resident": own["tokens_per_s"] / best.speed()["tokens_per_s"],
        **counted(run.before, run.after, length.segments * length.each),
        "peak_gib": peak_gib(),
        "same": all(map(torch.equal, run.logits, best.logits)),
    }


def counted(before: ExpertUse, after: ExpertUse, steps: int) -> Row:
    """What the cache did in so many steps."""

    def more(name: str) -> int:
        return int(getattr(after, name) - getattr(before, name))

    ahead, used = more("foreseen"), more("foreseen_used")
    return {
        "hit_rate": more("hits") / (more("hits") + more("misses")),
        "misses_a_step": more("misses") / steps,
        "precision": used / ahead if ahead else "",
        "fetched_mb_a_step": more("fetched_bytes") / steps / 1e6,
        "wasted_mb_a_step": more("wasted_bytes") / steps / 1e6,
    }


def save(figures: dict[str, Any], out: Path | None) -> None:
    """Write the result and, if no row is at fault, the headline figure."""
    written = [write_result("experts_offload", figures), HEADLINE_FILE]
    rows = [row for row in figures["rows"] if row["way"] != "resident"]
    if faults := [row for row in rows if not row["same"] or row["peak_gib"] > BUDGET]:
        print(f"no headline figure: {len(faults)} rows with other tokens or over the budget")
    else:
        find = {(row["batch"], row["way"]): row for row in figures["rows"]}
        ours, best = find[1, "foreseen"], find[1, "resident"]
        spread = ours["low"] / best["high"], ours["high"] / best["low"]
        write_headline("b26_8gib_fraction", ours["of_resident"], "fraction", spread)
    for path in written:
        print(f"written: {path}")
        if out is not None:
            shutil.copy(path, out)


if __name__ == "__main__":
    main()

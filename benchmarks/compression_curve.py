"""Quality against bytes: how many survive, in how many bits, in which pattern.

One trained model (`examples/train_model.py`), compressed in many ways: the survivors picked by
|w| * |x| in each pattern, so that patterns alone differ; then all recovered by equally many steps
on the training text. Told is held-out perplexity over the dense model's, before and after. Given
up: unstructured and 2:4 have no kernels here, so their bytes are counted, not stored (a bit a
weight for a bitmap, two a survivor for 2:4).
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from conclave.kernels.formats import SPAN, Format, PackedWeight
from conclave.kernels.layouts import pack
from conclave.worker.compress.pruning import strongest
from conclave.worker.compress.recovery.lessons import Lessons, autocast
from conclave.worker.compress.recovery.loss import hidden_states, losses
from conclave.worker.compress.recovery.schedule import Schedule
from conclave.worker.compress.recovery.training import Recovery
from conclave.worker.model.config import ModelConfig
from conclave.worker.model.decoder import Decoder
from conclave.worker.model.packed import fill, packable, packed_order
from conclave.worker.weights import load_decoder
from examples.debian_model.compressing import packed_rows
from examples.debian_model.encoding import Encoded

from .records import stamp, write_result

NORM_ROWS, JUDGED_ROWS = 8, 64
"""Training rows that tell what weights are fed, and validation rows that choose the best step."""
console = Console(stderr=True)


@dataclass(frozen=True)
class Way:
    """One point of the curve."""

    pattern: str
    """`N:16`, `dense`, `unstructured` or `2:4`."""
    kept: float
    """Share of weights that survive."""
    bits: int

    @property
    def bits_a_weight(self) -> float:
        """With positions and scales (bfloat16, for 64 columns)."""
        if self.pattern == "dense" and self.bits == 16:
            return 16.0
        places = {"dense": 0.0, "unstructured": 1.0, "2:4": 2 * self.kept}
        scales = 0.25 if self.bits < 16 else 0.0
        return self.kept * self.bits + places.get(self.pattern, 4 * self.kept) + scales

    @property
    def format(self) -> Format | None:
        """That it is trained in; None if nothing is to be done."""
        if self.pattern.endswith(":16"):
            kept = int(self.pattern.partition(":")[0])
            return Format(kept, self.bits, 64 if self.bits < 16 else 0)
        return Format(SPAN, self.bits, 64) if self.bits < 16 else None

    def mask(self, strength: Tensor) -> Tensor:
        """bool [R, K]: the strongest, as the pattern has them."""
        if self.pattern == "unstructured":
            each = int(self.kept * strength.shape[1])
            chosen = strength.topk(each, dim=1).indices
            return torch.zeros_like(strength, dtype=torch.bool).scatter_(1, chosen, True)
        if self.pattern == "2:4":
            fours = strength.unflatten(1, (-1, 4))
            chosen = fours.topk(2, dim=-1).indices
            return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, chosen, True).flatten(1)
        return strongest(strength, round(self.kept * SPAN))


WAYS = (
    *(Way("dense", 1.0, bits) for bits in (8, 4)),
    *(Way(f"{n}:16", n / 16, bits) for n in (8, 6, 5, 4) for bits in (16, 8, 4)),
    Way("2:4", 0.5, 4),
    Way("unstructured", 0.375, 4),
    Way("unstructured", 0.3125, 4),
)
"""2:4 has the bytes of 6:16, unstructured with 37.5 % kept those of 5:16."""


def main() -> None:
    """Every way, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the dense model")
    parser.add_argument("work", type=Path, help="folder with its encoded text")
    parser.add_argument("--steps", type=int, default=400, help="of recovery")
    parser.add_argument("--rows", type=int, default=64, help="of 1,024 tokens in a step")
    parser.add_argument("--judged", type=int, default=JUDGED_ROWS, help="rows of validation text")
    parser.add_argument("--held-out", type=int, help="rows of held-out text; all if left out")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th way, from the I-th")
    parser.add_argument("--out", type=Path, help="folder for the part's result, for --join")
    parser.add_argument("--join", action="store_true", help="only join the parts that lie in --out")
    options = parser.parse_args()
    if options.join:
        if options.out is None:
            parser.error("--join needs the folder of the parts as --out")
        write_result("compression_curve", joined(options.out))
        return
    first, step = map(int, options.part.split("/"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = {
        name: packed_rows(Encoded.load(options.work / f"{name}.npz"), seed=0)
        for name in ("training", "validation", "heldout")
    }
    splits["heldout"] = splits["heldout"][: options.held_out]
    splits["validation"] = splits["validation"][: options.judged]
    bench = Bench(options.model, splits, options.steps, options.rows, device)
    points: list[dict[str, Any]] = []
    figures = {"model": options.model.name, "steps": options.steps, "points": points}
    for way in track(WAYS[first::step], console=console):
        points.append(bench.point(way))
        if options.out:  # each time, as the machine may be gone before the last one
            part = options.out / f"compression_curve_{first}.json"
            part.write_text(json.dumps(figures | {"made": stamp()}, indent=1) + "\n")
    if not options.out:
        write_result("compression_curve", figures)


def joined(folder: Path) -> dict[str, Any]:
    """The figures of all parts, in the order of `WAYS`. Parts of unequal runs are refused."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("compression_curve_*"))]
    runs = {(part["model"], part["steps"], part["made"]["device"]) for part in parts}
    if len(runs) != 1:
        raise SystemExit(f"{folder} has parts of {len(runs)} different runs; give those of one")
    order = [(way.pattern, way.kept, way.bits) for way in WAYS]
    points = [point for part in parts for point in part["points"]]
    points.sort(key=lambda own: order.index((own["pattern"], 1 - own["sparsity"], own["bits"])))
    ((model, steps, device),) = runs
    return {"model": model, "steps": steps, "made_on": device, "points": points}


class Bench:
    """The dense model, what its weights are fed, and the text."""

    def __init__(
        self, model: Path, splits: dict[str, Tensor], steps: int, rows: int, device: torch.device
    ) -> None:
        self.model, self.splits, self.device = model, splits, device
        self.schedule = Schedule(steps=steps, sequences=rows, at_once=min(rows, 32), looks=4)
        self.config = ModelConfig.load(model)
        self.teacher = self.load().requires_grad_(False)
        self.held_out_text = Lessons(splits["heldout"], (self.teacher,))
        self.norms = dict(norms_of(self.teacher, splits["training"][:NORM_ROWS].to(device)))
        self.loss = self.held_out(self.teacher)

    def load(self) -> Decoder:
        return load_decoder(self.model, self.config, self.device, torch.float32)

    def point(self, way: Way) -> dict[str, Any]:
        """Held-out perplexity over the dense model's, before recovery and after."""
        student = self.load()
        weights, packed, masks = dict(student.named_parameters()), {}, {}
        assert way.format is not None
        for name, norms in self.norms.items():
            weight = weights[name].detach()
            mask = way.mask(weight.abs() * norms)
            packed[name] = packed_as(name, weight, way.format, mask)
            fill(name, weights[name], packed[name])
            if not way.pattern.endswith(":16") and way.pattern != "dense":
                masks[name] = mask
        before = self.held_out(student)
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state"
            run = Recovery(student, packed, self.teacher, self.schedule, state, masks=masks)
            run.run(self.splits["training"], self.splits["validation"])
        after = self.held_out(run.student)
        found = {
            "pattern": way.pattern,
            "sparsity": 1 - way.kept,
            "bits": way.bits,
            "bits_a_weight": way.bits_a_weight,
            "one_shot": round(math.exp(min(20.0, before - self.loss)), 4),
            "recovered": round(math.exp(after - self.loss), 4),
        }
        console.print_json(json.dumps(found), indent=None)
        return found

    def held_out(self, student: Decoder) -> float:
        """Mean negative log-likelihood of a token of the held-out rows."""
        rows, parts = self.held_out_text, []
        with torch.no_grad(), autocast(self.device):
            for part in torch.arange(len(rows)).split(32):
                found = losses(student, rows.teachers, *rows.of(part))[1]
                parts.append(float(found) * len(part) / len(rows))
        return sum(parts)


def packed_as(name: str, weight: Tensor, format: Format, mask: Tensor) -> PackedWeight:
    """A plain weight, pruned and rounded."""
    ordered = packed_order(name, torch.where(mask, weight, 0.0))
    return pack(ordered.contiguous(), format, mask=packed_order(name, mask))


def norms_of(decoder: Decoder, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """|x| of every column of each large weight, [K], over some text. Dense models only."""
    sums: dict[str, Tensor] = {}
    names = [name for names in packable(decoder).values() for name in names]
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            module = decoder.get_submodule(name.removesuffix(".weight"))
            handle = module.register_forward_pre_hook(adding(sums, name))
            stack.callback(handle.remove)
        for row in rows:
            hidden_states(decoder, row[None])
    return ((name, own.sqrt()) for name, own in sums.items())


def adding(sums: dict[str, Tensor], name: str) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        own = inputs[0].float().square().flatten(0, -2).sum(0)
        sums[name] = sums[name] + own if name in sums else own

    return add


if __name__ == "__main__":
    main()

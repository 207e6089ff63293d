"""Compression of a trained checkpoint, with Conclave's own tools, on the text it was trained on.

Pruned and quantized in one shot, then recovered by training against the dense model. Rows hold
several documents, as in training, so that most of a row is text. Given up: documents cut at the
ends of rows, a few in a hundred, which are learned without their beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from conclave.kernels.formats import Format
from conclave.worker.compress.layerwise import compress_checkpoint, measure
from conclave.worker.compress.recipe import Recipe, allotted
from conclave.worker.compress.recovery.recover import recover_checkpoint
from conclave.worker.compress.recovery.schedule import Schedule
from conclave.worker.compress.recovery.synthetic import write_text
from conclave.worker.compress.recovery.training import Look

from .encoding import Encoded
from .files import RouteError

CALIBRATION_ROWS = 256
ROW_LENGTH = 1024
FORMAT = "5:16-int4-g64"
TABLES = "dense-int8-g64"

Told = Callable[[object], None]


@dataclass(frozen=True)
class Splits:
    """Rows of tokens, int64 [n, ROW_LENGTH]."""

    training: torch.Tensor
    validation: torch.Tensor
    written: int = 0
    """Of the training rows the last ones, which teachers wrote."""

    @classmethod
    def of(cls, training: Encoded, validation: Encoded, seed: int = 0) -> Splits:
        return cls(packed_rows(training, seed), packed_rows(validation, seed))

    def taught_by(
        self,
        teachers: Sequence[Path],
        rows: int | None,
        synthetic: int,
        device: torch.device,
        kept: Path | None = None,
    ) -> Splits:
        """With the first `rows` for training, and as many `synthetic` ones that teachers write.

        They are `kept` in a file, or are the first of one that was. Raises RouteError if it has
        fewer, or rows of another length.
        """
        training = self.training[:rows]
        if not synthetic:
            return Splits(training, self.validation)
        if kept is not None and kept.exists():
            written = torch.from_numpy(numpy.load(kept).astype(numpy.int64))[:synthetic]
            if written.shape != (synthetic, training.shape[1]):
                raise RouteError(
                    f"{kept} has rows {tuple(written.shape)}; {synthetic} of {training.shape[1]} "
                    "tokens are wanted: name another file"
                )
        else:
            written = write_text(teachers, self.training, synthetic, 0, device)
            if kept is not None:
                numpy.save(kept, written.numpy().astype(numpy.uint16))
        return Splits(torch.cat((training, written)), self.validation, synthetic)


def packed_rows(encoded: Encoded, seed: int) -> torch.Tensor:
    """All documents end to end, in an order that `seed` decides, cut into rows."""
    order = numpy.random.default_rng(seed).permutation(len(encoded.ends))
    pieces = [encoded.tokens[encoded.starts[index] : encoded.ends[index]] for index in order]
    stream = torch.from_numpy(numpy.concatenate(pieces).astype(numpy.int64))
    return stream[: len(stream) // ROW_LENGTH * ROW_LENGTH].view(-1, ROW_LENGTH)


def compress_in_one_shot(
    original: Path,
    target: Path,
    rows: torch.Tensor,
    device: torch.device,
    format: str = FORMAT,
    sparsity: float | None = None,
) -> None:
    """Prune and quantize the layers by their inputs on some of the training rows.

    To an average of `sparsity`, N of each weight by how much it matters; or all as `format` says.
    """
    recipe = Recipe(Format.parse(format), "sparsegpt", embeddings=Format.parse(TABLES))
    sample = rows[:CALIBRATION_ROWS]
    if sparsity is not None:
        recipe = allotted(recipe, measure(original, sample, device), sparsity)
    about: dict[str, object] = {"format": format, "sparsity": sparsity}
    compress_checkpoint(original, target, recipe, sample, device, about)


def recover(
    one_shot: Path,
    original: Path,
    target: Path,
    splits: Splits,
    schedule: Schedule,
    device: torch.device,
    say: Told,
    teachers: Sequence[Path] = (),
    until: float = math.inf,
) -> list[Look]:
    """Train what is left against the original and `teachers`, judged by the validation rows.

    It ends by `until`, of `time.monotonic()`.
    """

    def told(step: int, done: float, look: Look | None) -> None:
        if look is not None:
            say(look)

    rows = splits.training, splits.validation
    given = one_shot, original, target, *rows, schedule, device, told, teachers, until
    return recover_checkpoint(*given, splits.written)

"""Training what a compressed checkpoint has kept against the full model that it was made of.

Teachers and student, with the optimizer's two numbers for each of its weights, are on one device
together. What is trained is kept in float32 and computed in bfloat16 on a GPU. A run that
was killed goes on from the last look at the held-out text, through the same numbers. What it gave
up: more than one device, and models whose optimizer does not fit beside them.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ....kernels.formats import PackedWeight
from ...errors import CheckpointError, ConfigError
from ...model.decoder import Decoder
from .lessons import Lessons, autocast
from .loss import losses
from .optimizers import optimizers_of, set_rate, step
from .schedule import Schedule
from .trained import Stored, train_packed, trained_values


@dataclass(frozen=True, slots=True)
class Look:
    """What the held-out text says after so many steps; divergences and losses in nats a token."""

    step: int
    done: float
    """Share of the run."""
    training_divergence: float
    training_loss: float
    divergence: float
    """KL(teachers || student) on the held-out text."""
    loss: float
    """Negative log-likelihood of the held-out text."""


Told = Callable[[int, float, Look | None], None]
"""(steps done, share of the run, the look just taken)"""


class Recovery:
    """One run: `student` has plain weights and is trained in place, in the form of `packed`.

    Args:
        student: float32, on the device that trains, with the values of `packed` in it.
        packed: the weights that are stored packed, by the decoder's names, on the same device.
        teacher: the full model, on the same device, in any floating dtype.
        others: more models of the same vocabulary there; the mean of all is what is taught.
        schedule: how to train.
        state: file for what a killed run needs to go on; `key` tells which run it is of.
        masks: bool [E?, R, K] by name, for patterns that no format knows; see `train_packed`.
    """

    def __init__(
        self,
        student: Decoder,
        packed: dict[str, PackedWeight],
        teacher: Decoder,
        schedule: Schedule,
        state: Path,
        key: str = "",
        masks: Mapping[str, Tensor] = MappingProxyType({}),
        others: Sequence[Decoder] = (),
    ) -> None:
        self.student, self.schedule = student, schedule
        self.teachers = (teacher, *others)
        self.looks: list[Look] = []
        self.best: Look | None = None
        self._state, self._key = state, key
        self._losses = losses
        originals = dict(teacher.named_parameters())
        self._stored: dict[str, Stored] = train_packed(
            *(student, packed, {name: originals[name].detach() for name in packed}, masks),
            remapped=schedule.remap > 0,
        )
        if masks and schedule.remap:
            raise ConfigError("a pattern that no format knows cannot be learned: leave remap at 0")
        if schedule.gradual:  # then the student begins as the teacher, and not pruned
            for name in packed:
                trained_values(student, name).data.copy_(originals[name])
        student.train().requires_grad_(True)
        self._growths = [own.growth for own in self._stored.values() if own.growth is not None]
        large = [trained_values(student, name) for name in packed if name.startswith("layers.")]
        self._optimizers = optimizers_of(
            *(student, large, self._growths, schedule.weight_decay),
            muon=schedule.optimizer == "muon",
        )
        self._best_values = self._values()
        self._step, self._done = 0, 0.0
        self._resume()

    def run(
        self,
        tokens: Tensor,
        held_out: Tensor,
        told: Told = lambda step, done, look: None,
        until: float = math.inf,
        written: int = 0,
    ) -> None:
        """Train on `tokens` [n, L], int64, and leave the student as it was best on `held_out`.

        The last `written` rows are the teachers' own text, whose likelihood is no aim. It ends by
        `until`, a time of `time.monotonic()`, with fewer steps if there is no time for all; then
        two runs differ. Raises ConfigError for less text than one step, or if training comes to
        numbers that are none.
        """
        schedule, device = self.schedule, self.student.embedding.weight.device
        if len(tokens) < schedule.sequences or not len(held_out):
            raise ConfigError(
                f"recovery has {len(tokens)} sequences to train on and {len(held_out)} held out, "
                f"and takes {schedule.sequences} a step: give more text, or shorter sequences"
            )
        judged = Lessons(held_out, self.teachers)
        lessons = Lessons(tokens, self.teachers, written)
        if device.type == "cuda":
            self._compile(*lessons.of(torch.arange(schedule.sequences)[: schedule.at_once]))
        batches = _batches(len(tokens), schedule, self._step)
        recent: list[Tensor] = []
        first, began = self._done, time.monotonic()
        while self._done < 1 and not self._in_vain():
            recent.append(self._learn(lessons, next(batches)))
            self._step += 1
            passed = (time.monotonic() - began) / max(until - began, 1e-9)
            before, by_time = self._done, first + (1 - first) * passed
            self._done = min(1.0, max(self._step / schedule.steps, by_time))
            self._remap()
            look = None
            if schedule.looks_by(self._done) > schedule.looks_by(before):
                look = self._look(torch.stack(recent).mean(0).tolist(), judged)
                recent.clear()
            told(self._step, self._done, look)
        self._restore(self._best_values)
        self._state.unlink(missing_ok=True)

    def packed(self) -> dict[str, PackedWeight]:
        """The trained weights as they are stored, by name."""
        return {
            name: own.repacked(trained_values(self.student, name))
            for name, own in self._stored.items()
        }

    def plain(self) -> dict[str, Tensor]:
        """All other parameters and buffers that a checkpoint has, by name."""
        names = self.student.state_dict().items()
        return {name: own for name, own in names if ".parametrizations." not in f".{name}"}

    def _compile(self, sequences: Tensor, theirs: list[Tensor], real: Tensor) -> None:
        """Several times as fast; where there is no compiler, it goes without."""
        compiled = torch.compile(losses)
        try:
            with autocast(sequences.device):
                compiled(self.student, self.teachers, sequences, theirs, real).sum().backward()
        except Exception as error:  # of any part of a compiler
            warnings.warn(f"recovery is slow, for it could not be compiled: {error}", stacklevel=2)
            torch.compiler.reset()
        else:
            self._losses = compiled
        self.student.zero_grad(set_to_none=True)

    def _learn(self, lessons: Lessons, chosen: Tensor) -> Tensor:
        """One step of the optimizer; divergence and loss before it, [2]."""
        self._set_kept(self._done)
        rate = self.schedule.rate(self._step, self._done)
        set_rate(self._optimizers, rate)
        found = torch.zeros(2, device=self.student.embedding.weight.device)
        for part in chosen.split(self.schedule.at_once):
            share = len(part) / len(chosen)
            with autocast(found.device):
                own = self._losses(self.student, self.teachers, *lessons.of(part)) * share
            divergence, loss = own
            text = self.schedule.text_share
            ((1 - text) * divergence + text * loss).backward()
            found += own.detach()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        step(self._optimizers)
        if self.schedule.weight_decay and self._growths:  # scales decay as what they are scales of
            lost = math.log1p(-rate * self.schedule.weight_decay)
            torch._foreach_add_([own.data for own in self._growths], lost)
        return found

    def _look(self, training: list[float], held_out: Lessons) -> Look:
        """Look at the held-out text in the final form, keep what is best, and save the run."""
        self._set_kept(1.0)
        parts = []
        with torch.no_grad(), autocast(self.student.embedding.weight.device):
            for part in torch.arange(len(held_out)).split(self.schedule.at_once):
                found = losses(self.student, self.teachers, *held_out.of(part))
                parts.append(found * (len(part) / len(held_out)))
        look = Look(self._step, self._done, *training, *torch.stack(parts).sum(0).tolist())
        if not look.divergence < float("inf"):
            raise ConfigError(
                f"training went astray at step {self._step}: try a lower learning rate "
                f"than {self.schedule.learning_rate}"
            )
        self.looks.append(look)
        if self.best is None or look.divergence < self.best.divergence:
            self.best, self._best_values = look, self._values()
        self._save()
        return look

    def _in_vain(self) -> bool:
        """Whether the last looks, all with the final maps, were no better than one before them."""
        schedule = self.schedule
        settled = max(schedule.gradual, schedule.remap)
        full = [look for look in self.looks if look.done >= settled]
        since = len(full) - 1 - full.index(self.best) if self.best in full else 0
        return since >= schedule.patience

    def _set_kept(self, done: float) -> None:
        for own in self._stored.values():
            own.kept.fill_(self.schedule.kept(done, own.format.kept))

    def _remap(self) -> None:
        """Choose survivors anew if it is time, and no more once that is over."""
        if self.schedule.remaps(self._step, self._done):
            for name, own in self._stored.items():
                own.remap(trained_values(self.student, name))
        elif 0 < self.schedule.remap <= self._done:
            self._fix_maps()

    def _fix_maps(self) -> None:
        for own in self._stored.values():
            own.learns.fill_(False)

    def _trained(self) -> dict[str, Tensor]:
        """What training changes, by name: the parameters, and maps if they are learned."""
        found = {name: own.detach() for name, own in self.student.named_parameters()}
        if self.schedule.remap > 0:
            found |= {f"{name} order": own.order for name, own in self._stored.items()}
        return found

    def _values(self) -> dict[str, Tensor]:
        return {name: own.cpu().clone() for name, own in self._trained().items()}

    def _restore(self, values: dict[str, Tensor]) -> None:
        self._set_kept(1.0)
        for name, own in self._trained().items():
            own.copy_(values[name])

    def _save(self) -> None:
        state = {
            "key": self._key,
            "schedule": asdict(self.schedule),
            "step": self._step,
            "done": self._done,
            "values": self._values(),
            "optimizers": [own.state_dict() for own in self._optimizers],
            "looks": [asdict(look) for look in self.looks],
            "best": self.looks.index(self.best) if self.best else None,
            "best_values": self._best_values,
        }
        unfinished = self._state.with_name(self._state.name + ".partial")
        torch.save(state, unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(self._state)

    def _resume(self) -> None:
        if not self._state.exists():
            return
        try:
            state: dict[str, Any] = torch.load(self._state, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken pickle fails in every way
            raise CheckpointError(
                f"{self._state} is no state of a recovery ({error}): remove it to begin anew"
            ) from error
        if state["key"] != self._key or state["schedule"] != asdict(self.schedule):
            raise ConfigError(
                f"{self._state} is of another run, with other models, text or settings: go on with "
                "those, or remove it to begin anew"
            )
        self._step, self._done = state["step"], state["done"]
        self.looks = [Look(**look) for look in state["looks"]]
        self.best = None if state["best"] is None else self.looks[state["best"]]
        self._best_values = state["best_values"]
        self._restore(state["values"])
        for own, saved in zip(self._optimizers, state["optimizers"], strict=True):
            own.load_state_dict(saved)
        if self._done >= self.schedule.remap:
            self._fix_maps()


def _batches(count: int, schedule: Schedule, done: int) -> Iterator[Tensor]:
    """Indices of the sequences of each step, behind the `done` first ones; every epoch anew."""
    per_epoch = count // schedule.sequences
    epoch, first = divmod(done, per_epoch)
    while True:
        draw = torch.Generator().manual_seed(schedule.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=draw)[: per_epoch * schedule.sequences]
        yield from order.split(schedule.sequences)[first:]
        epoch, first = epoch + 1, 0

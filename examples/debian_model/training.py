"""Training: one run of AdamW from fresh weights, which keeps what was best on validation.

Weight decay does the work against overfitting; see the card for what is left of it. Given up:
more than one device, resuming a run, and dropout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from .checkpoint import new_model
from .encoding import Encoded
from .rows import Rows
from .shapes import Recipe, Shape

Report = Callable[[object], None]
"""Shows the person what happens, a line at a time."""
Loss = Callable[[torch.Tensor], torch.Tensor]
"""From a batch of rows to their mean loss."""


def sliding_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a token may look: itself and the tokens before it in the window."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


class Trainer:
    """One training run: keeps the weights that were best on the validation documents."""

    def __init__(
        self, shape: Shape, recipe: Recipe, splits: tuple[Encoded, Encoded], report: Report
    ) -> None:
        training, validation = splits
        self.recipe = recipe
        self.report = report
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = new_model(shape.config, recipe.seed).to(self.device)
        self.rows = Rows(training, recipe.row_length, recipe.seed, self.device)
        self.validation = Rows(validation, recipe.row_length, 0, self.device)
        self.rows_per_step = recipe.tokens_per_step // recipe.row_length
        self.steps = math.ceil(recipe.epochs * len(training.tokens) / recipe.tokens_per_step)
        self.masks = {
            "full_attention": None,
            "sliding_attention": sliding_mask(
                recipe.row_length, shape.config["sliding_window"], self.device
            ),
        }
        self.optimizer = self.new_optimizer()
        self.history: list[dict[str, float]] = []
        self.best_loss = math.inf
        self.best: dict[str, torch.Tensor] = {}
        self.until = time.perf_counter() + 60 * recipe.minutes
        self.seconds = 0.0
        self.compiled = False

    def new_optimizer(self) -> torch.optim.Optimizer:
        matrices = [weight for weight in self.model.parameters() if weight.ndim > 1]
        vectors = [weight for weight in self.model.parameters() if weight.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": self.recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=self.device.type == "cuda")

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean loss over a batch of rows, with bfloat16 matrix products on a GPU."""
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            logits = self.model(
                input_ids=batch[:, :-1], attention_mask=self.masks, use_cache=False
            ).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def compiled_loss(self, batch: torch.Tensor) -> Loss:
        """`loss`, compiled where that works: a failed compilation must not waste the run."""
        if self.device.type != "cuda":
            return self.loss
        compiled: Loss = torch.compile(self.loss)
        try:
            compiled(batch).backward()
        except Exception as error:
            self.report(f"not compiled: {error}")
            torch.compiler.reset()
            return self.loss
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.compiled = True
        return compiled

    def validation_loss(self) -> float:
        with torch.no_grad():
            losses = [self.loss(batch) for batch in self.validation.epoch(16)]
        return float(torch.stack(losses).mean())

    def progress(self, step: int, started: float) -> float:
        """How far the run is, by its steps or by its time, whichever ends first."""
        passed = (time.perf_counter() - started) / max(self.until - started, 1e-9)
        return max(step / self.steps, passed)

    def run(self) -> None:
        """Train; the learning rate rises over the first steps, then falls linearly to zero."""
        stream = self.rows.batches(self.rows_per_step)
        loss_of = self.compiled_loss(next(stream))
        started = time.perf_counter()
        recent: list[torch.Tensor] = []
        marks = [(mark + 1) / self.recipe.evaluations for mark in range(self.recipe.evaluations)]
        step = 0
        while marks:
            progress = self.progress(step, started)
            if progress >= marks[0] or progress >= 1:
                marks = [mark for mark in marks if mark > progress]
                if recent:
                    self.evaluate(step, recent, time.perf_counter() - started)
                    recent.clear()
                continue
            rate = self.recipe.learning_rate * min((step + 1) / self.recipe.warmup_steps, 1)
            recent.append(self.step(loss_of, next(stream), rate * (1 - progress)))
            step += 1
        self.seconds = time.perf_counter() - started
        self.model.load_state_dict(self.best)

    def step(self, loss_of: Loss, batch: torch.Tensor, rate: float) -> torch.Tensor:
        """One step of the optimizer at this learning rate; returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def evaluate(self, step: int, recent: list[torch.Tensor], seconds: float) -> None:
        """Note the losses and keep the weights if they are the best so far."""
        validation = self.validation_loss()
        entry = {
            "step": step,
            "tokens": step * self.rows_per_step * self.recipe.row_length,
            "seconds": round(seconds, 1),
            "training_loss": round(float(torch.stack(recent).mean()), 4),
            "validation_loss": round(validation, 4),
        }
        self.history.append(entry)
        self.report(entry)
        if validation < self.best_loss:
            self.best_loss = validation
            self.best = {name: value.clone() for name, value in self.model.state_dict().items()}

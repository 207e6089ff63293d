"""Runs a decoder over a paged cache of keys and values.

Owns the cache's tensors and nothing else: which block belongs to whom is the scheduler's business.
Decode steps are replayed, by a CPU from one recording (`recording`), by a GPU from one for each
size (`replayed`). What it gave up: keys and values in one tensor, which one gather could read.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels.reference import Pages, plan_pages
from ..memory.experts.cache import ExpertCache
from ..memory.streaming.layers import LayerStream
from ..model.config import ModelConfig, cache_groups
from ..model.decoder import Decoder
from .batch import Chunk, Integers, Step, build_step
from .caches import Caches, NarrowCaches, PlainCaches
from .host_blocks import HostBlocks
from .recording import RecordedDecode, can_record
from .replayed import Outcome, ReplayedDecode, Replaying


class ModelRunner:
    """A decoder and its cache on one device.

    Args:
        decoder: the model.
        config: its shape.
        caches: of all its layers that own keys.
        block_size: tokens in a block of them.
        device: where all is.
        dtype: of the queries.
        stream: of the layers, or experts, that do not stay on the device, if there are any.
        host: room on the host for blocks that fall out of the caches, if there is some.
        replaying: how a GPU's decode steps are recorded, if they are.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: ModelConfig,
        caches: PlainCaches | NarrowCaches,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        stream: LayerStream | ExpertCache | None = None,
        host: HostBlocks | None = None,
        replaying: Replaying | None = None,
    ) -> None:
        self.decoder = decoder.requires_grad_(False)
        self.config = config
        self.caches = caches
        self.block_size = block_size
        self.device = device
        self.stream = stream if isinstance(stream, LayerStream) else None
        self.experts = stream if isinstance(stream, ExpertCache) else None
        self.host = host
        self.groups = cache_groups(config)
        self.windows = [group.window for group in self.groups]
        # Kernels mask as they go.
        by_kernels = device.type == "cuda" and dtype != torch.float32
        self._mask_dtype = None if by_kernels else dtype
        self.watched = False
        """Whether each layer must run by itself, as a recording's layers do not."""
        self.broken: list[int] = []
        """Chunks of the last step in which a token came out as NaN, so that keys and values of
        theirs may hold NaN. Decoding steps are not looked at: there the logits show it."""
        self.overfull: list[int] = []
        """Chunks of the last step with keys or values for which there was no room: what the step
        says of them is not within their error."""
        self._recorded: RecordedDecode | None = None
        if stream is None and isinstance(caches, PlainCaches) and can_record(config, device):
            tensors = caches.tensors
            self._recorded = RecordedDecode(self._plain_logits, tensors, self.windows, block_size)
        self._replayed: ReplayedDecode | None = None
        if replaying is not None:
            experts = any(layer.experts is not None for layer in config.layers)
            self._replayed = ReplayedDecode(
                self._run, replaying, self.windows, block_size, device, experts, stream
            )

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Runs one step and stores its keys and values.

        Returns float32 logits [sum of chunk.logits, vocab], in the order of the chunks.
        """
        self.broken, self.overfull = [], []
        one_each = all(len(chunk.tokens) == chunk.logits == 1 for chunk in chunks)
        if self._replayed and one_each and not self.watched:
            outcome = self._replayed(chunks, self._limits(chunks))
            self._look(outcome, np.arange(len(chunks)))
            return outcome.logits
        step = build_step(chunks, self.windows, self.block_size, self.device)
        if self._recorded and one_each and not self.watched:
            return self._recorded(step)
        assert step.owners is not None
        limits = None
        if isinstance(self.caches, NarrowCaches):
            each = np.asarray(self._limits(chunks), np.float32)[step.owners]
            limits = torch.from_numpy(each).to(self.device)
        outcome = self._run(step, limits)
        self._look(outcome, step.owners)
        return outcome.logits

    def close(self) -> None:
        """Release what lies on the host; nothing may run any more."""
        for own in (self.stream, self.experts, self.host):
            if own is not None:
                own.close()

    @torch.inference_mode()
    def renew(self, blocks: Sequence[Sequence[int]]) -> None:
        """Told before a step which blocks, by group, it writes for new owners."""
        if isinstance(self.caches, NarrowCaches):
            for group, numbers in enumerate(blocks):
                if numbers:
                    self.caches.release(group, torch.tensor(numbers, device=self.device))

    @torch.inference_mode()
    def wipe(self, blocks: Sequence[Sequence[int]]) -> None:
        """Zero the keys and values of blocks, given for each cache group."""
        self.renew(blocks)
        for group, numbers in zip(self.groups, blocks, strict=True):
            if numbers:
                self.caches.wipe(group, torch.tensor(numbers, device=self.device))

    def _limits(self, chunks: Sequence[Chunk]) -> list[float]:
        """How far off keys and values of each chunk may be; of no use to plain caches."""
        own = self.caches.max_error if isinstance(self.caches, NarrowCaches) else 0.0
        return [own if chunk.max_error is None else chunk.max_error for chunk in chunks]

    def _run(self, step: Step, limits: Tensor | None) -> Outcome:
        if isinstance(self.caches, NarrowCaches):
            assert limits is not None
            self.caches.begin(limits)
        hidden = self._hidden(step, self.caches)
        marks = None
        if isinstance(self.caches, NarrowCaches):
            # Keys or values that are not finite make NaN of their own token's attention.
            marks = torch.stack((hidden.isnan().any(dim=-1), self.caches.failed))
        elif not (step.decodes and step.logit_rows is None):
            broken = hidden.isnan().any(dim=-1)
            marks = torch.stack((broken, torch.zeros_like(broken)))
        return Outcome(self._logits(step, hidden), marks)

    def _plain_logits(self, step: Step, caches: Caches) -> Tensor:
        return self._logits(step, self._hidden(step, caches))

    def _look(self, outcome: Outcome, owners: Integers) -> None:
        """Find out which chunks are broken or overfull; `owners` are those of rows."""
        if outcome.marks is None:
            return
        found: list[set[int]] = [set(), set()]
        for kind, row in outcome.marks.nonzero().tolist():
            found[kind].add(int(owners[row]))
        self.broken, self.overfull = sorted(found[0]), sorted(found[1] - found[0])

    def _hidden(self, step: Step, caches: Caches) -> Tensor:
        attention = PagedAttention(self.config, step, caches, self._pages(step))
        hidden: Tensor = self.decoder(step.tokens, step.positions, attention)
        return hidden

    def _pages(self, step: Step) -> list[list[Pages]]:
        """Where the queries of each part find their keys, in each group."""
        return [
            [
                plan_pages(
                    tables,
                    offsets,
                    group.window,
                    queries=part.queries,
                    block_size=self.block_size,
                    dtype=self._mask_dtype,
                    begins=begins,
                )
                for group, tables, offsets, begins in zip(
                    self.groups, part.tables, part.offsets, part.begins, strict=True
                )
            ]
            for part in step.parts
        ]

    def _logits(self, step: Step, hidden: Tensor) -> Tensor:
        if step.logit_rows is not None:
            hidden = hidden.index_select(0, step.logit_rows)
        return self.decoder.logits(hidden)


class PagedAttention:
    """The `Attention` of one step: stores what is new, then reads the cache.

    Args:
        config: of the model.
        step: whose rows they are.
        caches: of the layers.
        pages: for each part of the step and each cache group.
    """

    def __init__(
        self, config: ModelConfig, step: Step, caches: Caches, pages: list[list[Pages]]
    ) -> None:
        self.caches = caches
        self.step = step
        self.pages = pages
        self.source = [layer.kv_source for layer in config.layers]
        self.group_of = {
            layer: number
            for number, group in enumerate(cache_groups(config))
            for layer in group.layers
        }

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        """See `Attention`."""
        source = self.source[layer]
        group = self.group_of[source]
        if key is not None and value is not None:
            self.caches.write(source, key, value, self.step.slots[group])
        if self.step.decodes:  # nothing that changes from step to step may enter a recording
            return self.caches.attend(source, query[:, None], self.pages[0][group])[:, 0]
        outputs = []
        for part, pages_of_part in zip(self.step.parts, self.pages, strict=True):
            queries = query[part.rows].view(part.sequences, -1, *query.shape[1:])
            mixed = self.caches.attend(source, queries, pages_of_part[group])
            outputs.append(mixed.flatten(0, 1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

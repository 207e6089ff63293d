"""Runs a decoder over a paged cache of keys and values.

Owns the cache's tensors and nothing else: which block belongs to whom is the scheduler's business.
What it gave up: a CUDA graph, and keys and values in one tensor, which one gather could read.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels.reference import Pages, paged_attention, plan_pages, write_kv
from ..model.config import CacheGroup, ModelConfig, cache_groups
from ..model.decoder import Decoder
from .batch import Chunk, Part, Step, build_step
from .recording import Caches, RecordedDecode, can_record


class ModelRunner:
    """A decoder and its cache on one device."""

    def __init__(
        self,
        decoder: Decoder,
        config: ModelConfig,
        blocks: tuple[int, ...],
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`blocks` is the number of blocks in each of `cache_groups(config)`, in that order."""
        self.decoder = decoder.requires_grad_(False)
        self.config = config
        self.block_size = block_size
        self.device = device
        self.dtype = dtype
        self.groups = cache_groups(config)
        self.windows = [group.window for group in self.groups]
        # Zeros, not empty: an unwritten slot of a block is read with weight 0, and 0 * NaN is NaN.
        self.caches: Caches = {}
        for group, count in zip(self.groups, blocks, strict=True):
            for index in group.layers:
                layer = config.layers[index]
                shape = (count, block_size, layer.kv_heads, layer.head_dim)
                self.caches[index] = (
                    torch.zeros(shape, device=device, dtype=dtype),
                    torch.zeros(shape, device=device, dtype=dtype),
                )

        self.broken: list[int] = []
        """Chunks of the last step in which a token came out as NaN, so that keys and values of
        theirs may hold NaN. Decoding steps are not looked at: there the logits show it."""
        self._recorded: RecordedDecode | None = None
        if can_record(config, device):
            self._recorded = RecordedDecode(self._run, self.caches, self.windows, block_size)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Runs one step and stores its keys and values.

        Returns float32 logits [sum of chunk.logits, vocab], in the order of the chunks.
        """
        step = build_step(chunks, self.windows, self.block_size, self.device)
        self.broken = []
        if step.decodes and step.logit_rows is None:
            return self._recorded(step) if self._recorded else self._run(step, self.caches)
        hidden = self._hidden(step, self.caches)
        self.broken = _broken(chunks, hidden)
        return self._logits(step, hidden)

    @torch.inference_mode()
    def wipe(self, blocks: Sequence[Sequence[int]]) -> None:
        """Zero the keys and values of blocks, given for each cache group."""
        for group, numbers in zip(self.groups, blocks, strict=True):
            if numbers:
                index = torch.tensor(numbers, device=self.device)
                for layer in group.layers:
                    for cache in self.caches[layer]:
                        cache.index_fill_(0, index, 0)

    def _run(self, step: Step, caches: Caches) -> Tensor:
        return self._logits(step, self._hidden(step, caches))

    def _hidden(self, step: Step, caches: Caches) -> Tensor:
        attention = PagedAttention(self.config, self.groups, step, caches)
        hidden: Tensor = self.decoder(step.tokens, step.positions, attention)
        return hidden

    def _logits(self, step: Step, hidden: Tensor) -> Tensor:
        if step.logit_rows is not None:
            hidden = hidden.index_select(0, step.logit_rows)
        return self.decoder.logits(hidden)


def _broken(chunks: Sequence[Chunk], hidden: Tensor) -> list[int]:
    """Which chunks have NaN in their hidden states [T, hidden], whose decoding rows come first.

    Keys or values that are not finite make NaN of their own token's attention, in the same layer.
    """
    rows = hidden.isnan().any(dim=-1).nonzero().flatten().tolist()
    if not rows:
        return []
    order = sorted(range(len(chunks)), key=lambda number: len(chunks[number].tokens) > 1)
    owners = np.repeat(order, [len(chunks[number].tokens) for number in order])
    return sorted({int(owners[row]) for row in rows})


class PagedAttention:
    """The `Attention` of one step: stores what is new, then reads the cache."""

    def __init__(
        self, config: ModelConfig, groups: Sequence[CacheGroup], step: Step, caches: Caches
    ) -> None:
        self.caches = caches
        self.step = step
        self.source = [layer.kv_source for layer in config.layers]
        self.group_of = {
            layer: number for number, group in enumerate(groups) for layer in group.layers
        }
        self.pages = [self._plan(part, groups) for part in step.parts]

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        """See `Attention`."""
        source = self.source[layer]
        group = self.group_of[source]
        key_cache, value_cache = self.caches[source]
        if key is not None and value is not None:
            write_kv(key, value, key_cache, value_cache, self.step.slots[group])
        if self.step.decodes:  # nothing that changes from step to step may enter a recording
            pages = self.pages[0][group]
            return paged_attention(query[:, None], key_cache, value_cache, pages)[:, 0]
        outputs = []
        for part, pages_of_part in zip(self.step.parts, self.pages, strict=True):
            queries = query[part.rows].view(part.sequences, -1, *query.shape[1:])
            mixed = paged_attention(queries, key_cache, value_cache, pages_of_part[group])
            outputs.append(mixed.flatten(0, 1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _plan(self, part: Part, groups: Sequence[CacheGroup]) -> list[Pages]:
        """Where the part's queries find their keys, in each group."""
        planned = []
        for group, tables, offsets in zip(groups, part.tables, part.offsets, strict=True):
            cache, _ = self.caches[group.layers[0]]
            planned.append(
                plan_pages(
                    tables,
                    offsets,
                    group.window,
                    queries=part.queries,
                    block_size=int(cache.shape[1]),
                    dtype=cache.dtype,
                )
            )
        return planned

"""Runs a decoder over a paged cache of keys and values.

Owns the cache's tensors and nothing else: which block belongs to whom is the scheduler's business.
What it gave up: a CUDA graph, and keys and values in one tensor, which one gather could read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.reference import Pages, paged_attention, plan_pages, write_kv
from .batch import Chunk, Part, Step, build_step
from .model.config import CacheGroup, ModelConfig, cache_groups
from .model.decoder import Decoder
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

        self._recorded: RecordedDecode | None = None
        if can_record(config, device):
            self._recorded = RecordedDecode(self._run, self.caches, self.windows, block_size)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Runs one step and stores its keys and values.

        Returns float32 logits [sum of chunk.logits, vocab], in the order of the chunks.
        """
        step = build_step(chunks, self.windows, self.block_size, self.device)
        if self._recorded is not None and step.decodes and step.logit_rows is None:
            return self._recorded(step)
        return self._run(step, self.caches)

    def _run(self, step: Step, caches: Caches) -> Tensor:
        attention = PagedAttention(self.config, self.groups, step, caches)
        hidden = self.decoder(step.tokens, step.positions, attention)
        if step.logit_rows is not None:
            hidden = hidden.index_select(0, step.logit_rows)
        return self.decoder.logits(hidden)


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

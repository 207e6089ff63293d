"""Which block of the KV cache holds what: pools, prefix reuse, sliding windows. No tensors here.

Layers with the same window form a group with a pool of its own, as in vLLM's hybrid allocator: the
blocks of sliding layers go back to their pool once the window has passed them, so those layers cost
a constant per sequence. A full block is known by a hash chained over all tokens before it; freed
blocks keep their content until they are needed (least recently freed first), which is the prefix
cache. What it gives up: blocks shorter than `block_size` are never shared.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass
from hashlib import blake2b

from .sequence import Sequence

SLID = -1
"""Table entry of a block that the window has passed."""


@dataclass(frozen=True, slots=True)
class PoolUse:
    """How full a pool is, in blocks."""

    window: int | None
    blocks: int
    used: int
    cached: int


class BlockPool:
    """Blocks of one cache group: reference counts and reusable contents."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(blocks))
        self._references = [0] * blocks
        self._hash: list[bytes | None] = [None] * blocks
        self._by_hash: dict[bytes, int] = {}
        self.cached = 0
        """Free blocks that still hold a reusable prefix."""
        self._distrusted: set[int] = set()
        self._soiled: list[int] = []
        self._renewed: list[int] = []

    @property
    def free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    def find(self, content: bytes) -> int | None:
        """The block that holds this content, if any."""
        return self._by_hash.get(content)

    def is_free(self, block: int) -> bool:
        """Whether no sequence holds the block."""
        return self._references[block] == 0

    def acquire(self, block: int) -> None:
        """Take one more reference to a block that `find` has found."""
        if self._references[block] == 0:
            del self._free[block]
            self.cached -= 1
        self._references[block] += 1

    def allocate(self) -> int:
        """A block with no content; forgets the least recently freed one if need be."""
        block, _ = self._free.popitem(last=False)
        content = self._hash[block]
        if content is not None:
            del self._by_hash[content]
            self._hash[block] = None
            self.cached -= 1
        self._references[block] = 1
        self._renewed.append(block)
        return block

    def release(self, block: int) -> None:
        """Give one reference back."""
        assert self._references[block] > 0, "released a block that nobody holds"
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free[block] = None
            if block in self._distrusted:
                self._distrusted.remove(block)
                self._soiled.append(block)
            if self._hash[block] is not None:
                self.cached += 1
            else:  # nothing worth keeping: the first to be taken again
                self._free.move_to_end(block, last=False)
                self._renewed.append(block)

    def remember(self, block: int, content: bytes) -> None:
        """Make a computed block findable, unless another one already holds the same."""
        if self._hash[block] is None and content not in self._by_hash:
            self._hash[block] = content
            self._by_hash[content] = block

    def distrust(self, block: int) -> None:
        """Let nobody find a block's content again, and have it wiped once nobody holds it."""
        held = self._references[block] > 0
        content = self._hash[block]
        if content is not None:
            del self._by_hash[content]
            self._hash[block] = None
            self.cached -= not held
        if held:
            self._distrusted.add(block)
        else:
            self._soiled.append(block)

    def forget(self) -> None:
        """Let nobody find what free blocks hold; what they hold may go."""
        for block in self._free:
            content = self._hash[block]
            if content is not None:
                del self._by_hash[content]
                self._hash[block] = None
                self._renewed.append(block)
        self.cached = 0

    def take_soiled(self) -> list[int]:
        """Blocks that must be wiped before the next step reads or writes any; told once."""
        soiled, self._soiled = self._soiled, []
        return soiled

    def take_renewed(self) -> list[int]:
        """Blocks whose content nobody needs any more, since the last call; told once."""
        renewed, self._renewed = self._renewed, []
        return list(dict.fromkeys(renewed))


class BlockManager:
    """Block tables of all sequences over all cache groups.

    Args:
        windows: for each group its sliding window in tokens, None for full attention.
        blocks: blocks in each group's pool.
        block_size: tokens in a block.
        prefix_cache: whether computed blocks are kept for reuse.
    """

    def __init__(
        self,
        windows: Items[int | None],
        blocks: Items[int],
        block_size: int,
        prefix_cache: bool,
    ) -> None:
        self.windows = tuple(windows)
        self.pools = tuple(BlockPool(count) for count in blocks)
        self.block_size = block_size
        self.prefix_cache = prefix_cache

    def use(self) -> tuple[PoolUse, ...]:
        """How full each pool is."""
        return tuple(
            PoolUse(window, pool.blocks, pool.blocks - pool.free, pool.cached)
            for window, pool in zip(self.windows, self.pools, strict=True)
        )

    def admit(self, sequence: Sequence, chunk: int) -> bool:
        """Give a waiting sequence its reusable prefix and blocks for the first `chunk` tokens.

        Refuses, changing nothing, unless blocks for all its known tokens are free, so that a
        sequence is not admitted only to be preempted in the middle of its prompt.
        """
        assert not sequence.tables
        hits = self._longest_prefix(sequence)
        if not self._fits(sequence, hits, chunk):
            return False
        sequence.tables = tuple([] for _ in self.pools)
        for group, pool in enumerate(self.pools):
            first = self._first_needed(group, hits * self.block_size)
            sequence.tables[group].extend([SLID] * first)
            for index in range(first, hits):
                block = pool.find(sequence.block_hashes[index])
                assert block is not None
                pool.acquire(block)
                sequence.tables[group].append(block)
        sequence.computed = hits * self.block_size
        extended = self.extend(sequence, min(sequence.computed + chunk, len(sequence.tokens)))
        assert extended, "admitted a sequence that does not fit"
        return True

    def extend(self, sequence: Sequence, length: int) -> bool:
        """Make the tables cover positions below `length`; False and no change if blocks lack."""
        wanted = -(-length // self.block_size)
        missing = [max(0, wanted - len(table)) for table in sequence.tables]
        if any(count > pool.free for count, pool in zip(missing, self.pools, strict=True)):
            return False
        for count, pool, table in zip(missing, self.pools, sequence.tables, strict=True):
            table.extend(pool.allocate() for _ in range(count))
        return True

    def commit(self, sequence: Sequence, computed: int) -> None:
        """Note that positions below `computed` are in the cache; let slid blocks go."""
        before, sequence.computed = sequence.computed, computed
        if self.prefix_cache:
            self._hash_blocks(sequence, computed)
            for index in range(before // self.block_size, computed // self.block_size):
                for pool, table in zip(self.pools, sequence.tables, strict=True):
                    pool.remember(table[index], sequence.block_hashes[index])
        for group in range(len(self.pools)):
            self._slide(sequence, group)

    def release(self, sequence: Sequence) -> None:
        """Give all blocks of a sequence back."""
        for pool, table in zip(self.pools, sequence.tables, strict=False):
            for block in reversed(table):  # the end first, so that beginnings stay reusable longer
                if block != SLID:
                    pool.release(block)
        sequence.tables = ()
        sequence.computed = 0

    def discard(self, sequence: Sequence) -> None:
        """Give all blocks of a broken sequence back, so that nobody reads what it has written.

        That includes blocks which have slid out of its windows but may still be found. Blocks that
        other sequences hold stay theirs: whoever reads something broken finds out by itself.
        """
        for pool in self.pools:
            for content in sequence.block_hashes:
                block = pool.find(content)
                if block is not None:
                    pool.distrust(block)
        for pool, table in zip(self.pools, sequence.tables, strict=False):
            for block in table:
                if block != SLID:
                    pool.distrust(block)
        self.release(sequence)

    def take_soiled(self) -> list[list[int]]:
        """For each pool the blocks that must be wiped before the next step; told once."""
        return [pool.take_soiled() for pool in self.pools]

    def take_renewed(self) -> list[list[int]]:
        """For each pool the blocks whose content nobody needs any more; told once."""
        return [pool.take_renewed() for pool in self.pools]

    def forget(self) -> None:
        """Give the prefix cache up, but for what sequences hold."""
        for pool in self.pools:
            pool.forget()

    def _first_needed(self, group: int, position: int) -> int:
        """Index of the oldest block that a query at `position` may look into."""
        window = self.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def _slide(self, sequence: Sequence, group: int) -> None:
        table = sequence.tables[group]
        index = min(self._first_needed(group, sequence.computed), len(table)) - 1
        while index >= 0 and table[index] != SLID:
            self.pools[group].release(table[index])
            table[index] = SLID
            index -= 1

    def _hash_blocks(self, sequence: Sequence, length: int) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        for index in range(len(hashes), length // size):
            tokens = array("I", sequence.tokens[index * size : (index + 1) * size])
            # Numbers stored within one error will not do for another.
            parent = hashes[-1] if hashes else str(sequence.max_error or "").encode()
            hashes.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())

    def _longest_prefix(self, sequence: Sequence) -> int:
        """Blocks at the beginning that every group can serve from its pool."""
        if not self.prefix_cache:
            return 0
        usable = len(sequence.tokens) - 1  # the last token must run: its logits are wanted
        if sequence.logprobs_from is not None:
            usable = min(usable, sequence.logprobs_from - 1)
        self._hash_blocks(sequence, len(sequence.tokens))
        hits = usable // self.block_size
        for group in range(len(self.pools)):
            hits = self._prefix_in_group(sequence, group, hits)
        # A later, stricter group may have shortened the prefix; a shorter one needs older sliding
        # blocks, so ask again until all agree.
        while hits and any(
            self._prefix_in_group(sequence, group, hits) < hits for group in range(len(self.pools))
        ):
            hits = min(
                self._prefix_in_group(sequence, group, hits) for group in range(len(self.pools))
            )
        return hits

    def _prefix_in_group(self, sequence: Sequence, group: int, limit: int) -> int:
        """The longest prefix of at most `limit` blocks for which this group has what is needed."""
        found = self.pools[group].find
        hashes = sequence.block_hashes
        if self.windows[group] is None:
            held = 0
            while held < limit and found(hashes[held]) is not None:
                held += 1
            return held
        end = limit
        while end > 0:
            index = end - 1
            first = self._first_needed(group, end * self.block_size)
            while index >= first and found(hashes[index]) is not None:
                index -= 1
            if index < first:
                return end
            end = index  # block `index` is missing: a prefix may end before it
        return 0

    def _fits(self, sequence: Sequence, hits: int, chunk: int) -> bool:
        size, total = self.block_size, len(sequence.tokens)
        for group, pool in enumerate(self.pools):
            first = self._first_needed(group, hits * size)
            reused = [pool.find(content) for content in sequence.block_hashes[first:hits]]
            taken = sum(block is not None and pool.is_free(block) for block in reused)
            end = total if self.windows[group] is None else min(total, hits * size + chunk)
            if taken + -(-end // size) - hits > pool.free:
                return False
        return True

"""Which block of the KV cache holds what: pools, prefix reuse, sliding windows. No tensors here.

Layers with the same window form a group with a pool of its own, as in vLLM's hybrid allocator: the
blocks of sliding layers go back to their pool once the window has passed them, so those layers cost
a constant per sequence. A full block is known by a hash chained over all tokens before it; freed
blocks keep their content until they are needed (least recently freed first), which is the prefix
cache; what has to go then may go on in host memory (`tier.py`). What it gives up: blocks shorter
than `block_size` are never shared.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass
from hashlib import blake2b

from .sequence import Sequence
from .tier import HostPool, Moves, TierUse

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
    """Blocks of one cache group: reference counts and reusable contents, some on the `host`."""

    def __init__(self, blocks: int, host: HostPool | None = None) -> None:
        self.blocks, self.host = blocks, host
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(blocks))
        self._references = [0] * blocks
        self._hash: list[bytes | None] = [None] * blocks
        self._by_hash: dict[bytes, int] = {}
        self.cached = 0
        """Free blocks that still hold a reusable prefix."""
        self._passed: set[int] = set()  # free, and not worth a place on the host
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

    def holds(self, content: bytes) -> bool:
        """Whether this content is here, or on the host."""
        return content in self._by_hash or (self.host is not None and self.host.holds(content))

    def price(self, content: bytes) -> int:
        """Free blocks that `take` needs for this content: none if a sequence holds it."""
        block = self.find(content)
        return int(block is None or self._references[block] == 0)

    def take(self, contents: Items[bytes]) -> list[int]:
        """One more reference to a block with each of these contents, all of which `holds` has.

        What lies on the host is in its block once the moves are made.
        """
        found = [self.find(content) for content in contents]
        for block in found:
            if block is not None:
                self._acquire(block)
        if self.host is None:
            return [block for block in found if block is not None]
        lost = [content for content, block in zip(contents, found, strict=True) if block is None]
        slots = {content: self.host.claim(content) for content in lost}
        blocks = iter([self.allocate() for _ in lost])
        taken = [next(blocks) if block is None else block for block in found]
        for content, block in zip(contents, taken, strict=True):
            if content in slots:
                self.host.restore(slots[content], block)
                self.remember(block, content)
        return taken

    def _acquire(self, block: int) -> None:
        if self._references[block] == 0:
            del self._free[block]
            self._passed.discard(block)
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
        if self.host is not None:
            self.host.abandon(block)
            if content is not None and block not in self._passed:
                self.host.spill(block, content)
        self._passed.discard(block)
        self._references[block] = 1
        self._renewed.append(block)
        return block

    def release(self, block: int, passed: bool = False) -> None:
        """Give one reference back; `passed` if a window has, and nobody is likely to come again."""
        assert self._references[block] > 0, "released a block that nobody holds"
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free[block] = None
            if passed:
                self._passed.add(block)
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
        host: for each group, blocks' room in host memory for what its pool forgets; empty if there
            is none, and always without `prefix_cache`.
    """

    def __init__(
        self,
        windows: Items[int | None],
        blocks: Items[int],
        block_size: int,
        prefix_cache: bool,
        host: Items[int] = (),
    ) -> None:
        self.windows = tuple(windows)
        tiers: Items[HostPool | None] = [HostPool(slots) for slots in host]
        tiers = tiers or [None] * len(blocks)
        self.pools = tuple(map(BlockPool, blocks, tiers))
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
        sequence.tables = tuple(array("q") for _ in self.pools)
        for group, pool in enumerate(self.pools):
            first = self._first_needed(group, hits * self.block_size)
            sequence.tables[group].extend([SLID] * first)
            sequence.tables[group].extend(pool.take(sequence.block_hashes[first:hits]))
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
        if self.prefix_cache and sequence.shares:
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
                if pool.host is not None:
                    pool.host.forget(content)
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

    @property
    def restoring(self) -> bool:
        """Whether blocks of a sequence that was admitted are on their way from the host."""
        return any(pool.host is not None and pool.host.restoring for pool in self.pools)

    def take_moves(self) -> tuple[Moves, ...]:
        """For each pool the copies to and from the host, before the next step; told once."""
        return tuple(pool.host.take_moves() for pool in self.pools if pool.host is not None)

    def host_use(self) -> tuple[TierUse, ...]:
        """How full the host's tier of each pool is; empty if there is none."""
        return tuple(pool.host.use() for pool in self.pools if pool.host is not None)

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
        # Who asks the same again begins behind the prompt's last full block.
        hits = (sequence.prompt_length - 1) // self.block_size
        prompt = range(self._first_needed(group, hits * self.block_size), hits)
        index = min(self._first_needed(group, sequence.computed), len(table)) - 1
        while index >= 0 and table[index] != SLID:
            self.pools[group].release(table[index], passed=index not in prompt)
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
        holds = self.pools[group].holds
        hashes = sequence.block_hashes
        if self.windows[group] is None:
            held = 0
            while held < limit and holds(hashes[held]):
                held += 1
            return held
        end = limit
        while end > 0:
            index = end - 1
            first = self._first_needed(group, end * self.block_size)
            while index >= first and holds(hashes[index]):
                index -= 1
            if index < first:
                return end
            end = index  # block `index` is missing: a prefix may end before it
        return 0

    def _fits(self, sequence: Sequence, hits: int, chunk: int) -> bool:
        size, total = self.block_size, len(sequence.tokens)
        for group, pool in enumerate(self.pools):
            first = self._first_needed(group, hits * size)
            taken = sum(map(pool.price, sequence.block_hashes[first:hits]))
            end = total if self.windows[group] is None else min(total, hits * size + chunk)
            if taken + -(-end // size) - hits > pool.free:
                return False
        return True

"""What the engine does with a sequence, as far as its blocks are concerned."""

from conclave.worker.scheduling.cache import BlockManager
from conclave.worker.scheduling.sequence import Sequence


def compute(blocks: BlockManager, sequence: Sequence, chunk: int = 64) -> None:
    """Admit a sequence and compute all it has."""
    assert blocks.admit(sequence, chunk)
    while sequence.remaining:
        end = min(sequence.computed + chunk, len(sequence.tokens))
        assert blocks.extend(sequence, end)
        blocks.commit(sequence, end)

"""What is left of a model's large weights: those of attention, MLP and experts.

A plain value, without torch: the orchestrator chooses workers by it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Precision:
    """How near the weights that run are to the full model's."""

    sparsity: float
    """The fraction of them that is pruned, on average."""
    weight_bits: int
    """The fewest bits that a value has: 4, 8, 16, or 32 for float32."""
    bits_per_weight: float
    """What one takes in the device's memory, scales, positions and padding included. On a CPU,
    where packed weights are unpacked, that is as much as without compression."""
    kv_error: float = 0.0
    """The least relative error that every key and value can be kept within; 0 if they are not
    rounded."""

    def __str__(self) -> str:
        return f"{self.weight_bits}-bit values, {self.sparsity:.1%} pruned"

"""Draws without state: a number in [0, 1) is a function of a seed and an index.

SplitMix64 (Steele et al., OOPSLA 2014). So a draw comes out the same in any batch, after a
preemption, when another worker resumes, and in the gateway when it chooses for an ensemble.
"""

_MASK64 = 2**64 - 1


def split_mix(value: int) -> int:
    """SplitMix64: a well-mixed 64-bit function of a 64-bit number."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that draws token `index` of the answer with this seed."""
    return (split_mix(split_mix(seed) ^ index) >> 11) * 2.0**-53

"""The int32 words of compressed-tensors' `pack-quantized`: a few codes each, first column lowest.

Of 4 bits column 8j + i lies in bits 4i to 4i + 3 of word j, of 8 bits column 4j + i in bits 8i to
8i + 7; each is the code plus half of the range, so that a pruned weight is 8 or 128. Only these two
widths, and whole words: groups of 32 columns and more leave no other.
"""

import torch
from torch import Tensor


def to_words(codes: Tensor, bits: int) -> Tensor:
    """int32 [R, K * bits / 32] from codes int8 [R, K] of 4 or 8 bits."""
    own = (codes + 8).view(torch.uint8) if bits == 4 else codes.view(torch.uint8) ^ 128
    if bits == 4:
        own = own[:, ::2] | (own[:, 1::2] << 4)
    return own.contiguous().view(torch.int32)


def of_words(words: Tensor, bits: int) -> Tensor:
    """int8 [R, K], the inverse of `to_words`."""
    own = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (own ^ 128).view(torch.int8)
    return torch.stack((own & 15, own >> 4), dim=-1).flatten(-2).view(torch.int8) - 8

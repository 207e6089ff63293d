"""Every op in plain torch: the truth that kernels are tested against, and what runs on a CPU.

A kernel has the name and the signature of its reference. What this file gave up is bandwidth: paged
attention copies the keys and values it reads before it multiplies, and linears expand their packed
weight, which kernels read in place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import KernelInputError
from .layouts import PackedWeight, unpack


@dataclass(frozen=True, slots=True)
class Pages:
    """Where B sequences of L queries each find their keys; made once a step and cache group.

    Key j of row b lies in block `tables[b, j // block_size]`. Query i of row b sees key j if
    `offsets[b] + i - window < j <= offsets[b] + i` (no lower bound when `window` is None).
    """

    tables: Tensor
    """int64 [B, blocks]: physical blocks, shorter rows filled up with any valid block."""
    offsets: Tensor
    """int64 [B]: the key index of each row's first query."""
    window: int | None
    begins: tuple[int, ...]
    """`offsets` as the host knows them; empty where L is 1."""
    bias: Tensor | None
    """[B, 1, L, blocks * block_size] in the queries' dtype: the rule above, 0 if seen, else -inf.

    None for kernels, which mask as they go.
    """


def plan_pages(
    tables: Tensor,
    offsets: Tensor,
    window: int | None,
    *,
    queries: int,
    block_size: int,
    dtype: torch.dtype | None,
    begins: tuple[int, ...] = (),
) -> Pages:
    """The `Pages` of rows with `queries` queries each, of `dtype`; None for kernels."""
    if dtype is None:
        return Pages(tables, offsets, window, begins, None)
    keys = torch.arange(tables.shape[1] * block_size, device=tables.device)
    own = (offsets[:, None] + torch.arange(queries, device=tables.device))[..., None]
    hidden = keys > own
    if window is not None:
        hidden |= keys <= own - window
    bias = torch.zeros(hidden.shape, dtype=dtype, device=tables.device)
    seen = bias.masked_fill_(hidden, -torch.inf)[:, None]
    return Pages(tables, offsets, window, begins, seen)


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> None:
    """Stores `key` and `value` [T, kv_heads, head_dim] of T tokens in the paged caches, in place.

    Caches are [blocks, block_size, kv_heads, head_dim]; token t goes to position `slots[t]`
    (int64 [T]), counted over all blocks, and those must differ. Nothing is stored of a token whose
    slot is negative. A recording of torch's calls takes the slots to be as it was made with: made
    with none that is negative, it refuses those that are.
    """
    stored = slots >= 0
    if not bool(stored.all()):
        key, value, slots = key[stored], value[stored], slots[stored]
    key_cache.flatten(0, 1).index_copy_(0, slots, key)
    value_cache.flatten(0, 1).index_copy_(0, slots, value)


def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, pages: Pages) -> Tensor:
    """softmax(query keys) values with scale 1; [B, L, heads, head_dim] to the same.

    Caches are [blocks, block_size, kv_heads, head_dim]; query head h reads kv head
    h // (heads / kv_heads). Keys that no query sees must be finite: they are multiplied by zero.
    """
    assert pages.bias is not None, "planned for kernels"
    rows, queries, heads, head_dim = query.shape
    kv_heads = key_cache.shape[2]
    blocks = pages.tables.flatten()
    shape = (rows, -1, kv_heads, head_dim)
    keys = key_cache.index_select(0, blocks).view(shape).transpose(1, 2)
    values = value_cache.index_select(0, blocks).view(shape).transpose(1, 2)
    if queries == 1:
        # The heads of a group take the place of the query positions: no key is repeated.
        grouped = query.view(rows, kv_heads, heads // kv_heads, head_dim)
        mixed = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=pages.bias, scale=1.0
        )
        return mixed.reshape(query.shape)
    return F.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=pages.bias, scale=1.0, enable_gqa=True
    ).transpose(1, 2)


def linear(
    x: Tensor, weight: PackedWeight, residual: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """(x weight^T + residual) * scale, from [..., K] to [..., R], in the dtype of `x`.

    Summed, added and multiplied in float32, rounded once. `residual` is [..., R]. KernelInputError
    if something does not fit.
    """
    output = _product(x, weight)
    if residual is not None:
        if residual.shape != output.shape:
            raise KernelInputError(
                f"the residual is {tuple(residual.shape)}; it must be {tuple(output.shape)}"
            )
        output += residual
    if scale is not None:
        output *= scale
    return output.to(x.dtype)


def gated_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """gelu_tanh(gate) * up, from [..., K] to [..., R/2]: rows 2i and 2i + 1 are gate's and up's.

    All in float32, rounded once to the dtype of `x`. Neighbouring rows are in one program, and in
    one thread of it, so that kernels need no other memory for this.
    """
    return _gated(_product(x, weight)).to(x.dtype)


def grouped_linear(x: Tensor, weight: PackedWeight, experts: Tensor, gated: bool = False) -> Tensor:
    """[T, K] to [T, R], token t by the weight `experts[t]` (int32 [T]) of the stack.

    Equal experts lie side by side. One token with several experts is `x.expand(count, -1)`. If
    `gated`, each is as `gated_linear`.
    """
    if weight.experts is None:
        raise KernelInputError("the weight is a single one; grouped_linear takes a stack")
    if x.dim() != 2 or experts.shape != x.shape[:1] or experts.dtype != torch.int32:
        raise KernelInputError(
            f"x is {tuple(x.shape)} and experts {experts.dtype} {tuple(experts.shape)}; "
            "they must be [T, K] and int32 [T]"
        )
    found = experts.unique().tolist()
    if len(experts.unique_consecutive()) > len(found):
        raise KernelInputError("equal experts must lie side by side; sort the tokens by them")
    if found and not 0 <= found[0] <= found[-1] < weight.experts:
        raise KernelInputError(f"experts are {found[0]} to {found[-1]} of {weight.experts}")
    rows = weight.rows // 2 if gated else weight.rows
    output = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    for index in found:
        own = experts == index
        product = _product(x[own], weight.expert(index))
        output[own] = (_gated(product) if gated else product).to(x.dtype)
    return output


def _gated(both: Tensor) -> Tensor:
    if both.shape[-1] % 2:
        raise KernelInputError(f"{both.shape[-1]} rows are no pairs of gate and up")
    pairs: Tensor = both.unflatten(-1, (-1, 2))
    gate, up = pairs.unbind(-1)
    return F.gelu(gate, approximate="tanh") * up


def _product(x: Tensor, weight: PackedWeight) -> Tensor:
    """x weight^T of a single weight in float32, [..., R]."""
    if weight.experts is not None or x.shape[-1] != weight.columns:
        stack = "" if weight.experts is None else f"a stack of {weight.experts}, each "
        raise KernelInputError(
            f"x is {tuple(x.shape)}; the weight is {stack}{weight.rows} x {weight.columns}"
        )
    return F.linear(x.float(), unpack(weight))

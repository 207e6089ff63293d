"""Gluon kernels on torch tensors, as far as ours for Hopper go: what is computed, not by whom.

Layouts are ignored, as they change no value; threads are not told apart, so that a barrier does
nothing. What runs behind the program's back ends as late as it may: copies into shared memory at
the wait that they are for, products at theirs. A part being copied holds no number, and a product
whose operands change under it is an error.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.language import constexpr
from triton.runtime.jit import JITFunction


@dataclass
class Pointer:
    """Places in a tensor's memory."""

    memory: Tensor
    offset: Any = 0

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + more)

    def to(self, dtype: torch.dtype, bitcast: bool) -> "Pointer":
        assert bitcast and not self.offset
        return Pointer(self.memory.view(dtype))

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.memory.dtype)


@dataclass
class Shared:
    """Shared memory, or a part or a view of it."""

    content: Tensor

    def index(self, place: Any) -> "Shared":
        return Shared(self.content[int(place)])

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.content.permute(*order))

    def store(self, values: Tensor) -> None:
        self.content.copy_(values)


@dataclass(eq=False)
class Product:
    """A product that is under way: its operands, what it is added to, and in the end its value."""

    left: Any
    right: Shared
    sums: Any
    value: Tensor | None = None
    at_first: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.at_first = self._now()

    def _now(self) -> Tensor:
        left = self.left.content if isinstance(self.left, Shared) else self.left
        if left.dtype == torch.int8:
            return (left.double() @ self.right.content.double()).int()
        return left.float() @ self.right.content.float()

    def end(self) -> None:
        own = self._now()
        assert torch.equal(own, self.at_first) and own.isfinite().all(), "operands have changed"
        sums = self.sums.value if isinstance(self.sums, Product) else self.sums
        self.value = own if sums is None else sums + own


_DTYPES = torch.int8, torch.int32, torch.int64, torch.float32, torch.bfloat16


def nothing_in(memory: Tensor) -> None:
    """Fills memory with what nobody may use."""
    memory.fill_(99 if memory.dtype == torch.int8 else torch.nan)


class Emulated:
    """One program after the other, of a grid in one dimension."""

    def __init__(self, function: JITFunction[Any]) -> None:
        self._number, self._count = 0, 0
        self._products: list[Product] = []
        self._copies: list[list[tuple[Tensor, Tensor]]] = [[]]
        self._run = self._own(function, {})

    def launch(self, count: int, *arguments: Any) -> None:
        """Runs `count` programs; tensors are passed as pointers."""
        self._count = count
        for number in range(count):
            self._number = number
            given = [Pointer(a.view(-1)) if isinstance(a, Tensor) else a for a in arguments]
            self._run(*given)
            assert not self._products and not any(self._copies), "something is still under way"

    def _own(self, function: JITFunction[Any], known: dict[int, Any]) -> Callable[..., Any]:
        """The function as Python, with our Gluon."""
        if id(function) in known:
            return known[id(function)]  # type: ignore[no-any-return]
        given: dict[str, Any] = {}
        made = types.FunctionType(function.fn.__code__, given, function.fn.__name__)
        known[id(function)] = made
        ours = {
            "gl": self,
            "tl": self,
            "async_copy": self,
            "barrier": lambda: None,
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self.warpgroup_mma,
            "warpgroup_mma_wait": self.warpgroup_mma_wait,
            "range": range,
            "len": len,
        }
        for name in function.fn.__code__.co_names:
            there = function.fn.__globals__.get(name)
            if name in ours:
                given[name] = ours[name]
            elif isinstance(there, JITFunction):
                given[name] = self._own(there, known)
            elif isinstance(there, constexpr):
                given[name] = there.value
        return made

    # The language.
    int8, int32, int64, float32, bfloat16 = _DTYPES
    static_range = range
    minimum = staticmethod(lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)))
    maximum = staticmethod(lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)))
    where = staticmethod(lambda c, a, b: torch.where(torch.as_tensor(c), a, b))
    exp, exp2, ceil = staticmethod(torch.exp), staticmethod(torch.exp2), staticmethod(torch.ceil)
    to_tensor = staticmethod(torch.tensor)
    pointer_type = staticmethod(lambda dtype: dtype)
    reshape = staticmethod(lambda a, shape: a.reshape(shape))
    permute = staticmethod(lambda a, order: a.permute(*order))
    split = staticmethod(lambda a: a.unbind(-1))
    join = staticmethod(lambda a, b: torch.stack((a, b), -1))
    sum = staticmethod(lambda a, axis: a.sum(axis))
    max = staticmethod(lambda a, axis: a.amax(axis))
    cdiv = staticmethod(lambda a, b: (a + b - 1) // b)
    convert_layout = staticmethod(lambda a, layout, assert_trivial=False: a)

    @staticmethod
    def SliceLayout(axis: int, parent: Any) -> None:
        return None

    def program_id(self, axis: int) -> Tensor:
        return torch.tensor(self._number, dtype=torch.int32)

    def num_programs(self, axis: int) -> int:
        return self._count

    def arange(self, start: int, stop: int, layout: Any = None) -> Tensor:
        return torch.arange(start, stop, dtype=torch.int32)

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: Any = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def full(self, shape: list[int], value: float, dtype: torch.dtype, layout: Any) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    def load(
        self, place: Pointer, mask: Any = True, other: float = 0, cache_modifier: str = ""
    ) -> Tensor:
        offset = torch.as_tensor(place.offset).long()
        there = torch.as_tensor(mask).broadcast_to(offset.shape)
        found = place.memory[torch.where(there, offset, 0)]
        return torch.where(there, found, torch.tensor(other, dtype=found.dtype))

    def store(self, place: Pointer, value: Tensor, mask: Any = True) -> None:
        assert value.dtype == place.memory.dtype
        there = torch.as_tensor(mask).broadcast_to(value.shape)
        place.memory[torch.as_tensor(place.offset).long()[there]] = value[there]

    def atomic_add(self, place: Pointer, value: Any, sem: str) -> Tensor:
        before = place.memory[int(place.offset)].clone()
        place.memory[int(place.offset)] += int(value)
        return before

    def atomic_xchg(self, place: Pointer, value: int, sem: str) -> None:
        place.memory[int(place.offset)] = value

    def inline_asm_elementwise(
        self, text: str, constraints: str, values: list[Any], dtype: Any, is_pure: bool, pack: int
    ) -> Any:
        assert pack == 1
        words = text.strip("{}; ").split("; ")[-1].split()[0]
        if words == "cvt.rn.bf16x2.f32":
            return torch.stack([each.bfloat16() for each in values], -1).view(torch.int32)[..., 0]
        if words == "mul.rn.bf16x2":
            pairs = values[0][..., None].contiguous().view(torch.bfloat16)
            return (pairs * values[1].bfloat16()[..., None]).view(torch.int32)[..., 0]
        if words == "and.b32":
            halves = values[0][..., None].contiguous().view(torch.bfloat16)
            return halves.float().unbind(-1)
        if words == "mov.b32":
            return values[0][..., None].contiguous().view(torch.bfloat16).unbind(-1)
        assert words == "shr.s32", text
        return values[0] >> 31

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        memory = torch.empty(shape, dtype=dtype)
        nothing_in(memory)
        return Shared(memory)

    def async_copy_global_to_shared(self, part: Shared, place: Pointer, mask: Any = True) -> None:
        self._copies[-1].append((part.content, self.load(place, mask)))
        nothing_in(part.content)
        for product in self._products:
            assert torch.equal(product._now(), product.at_first), "copied over an operand"

    def commit_group(self) -> None:
        self._copies.append([])

    def wait_group(self, outstanding: int) -> None:
        assert not self._copies[-1], "a copy without a group"
        while len(self._copies) - 1 > outstanding:
            for part, values in self._copies.pop(0):
                part.copy_(values)

    def warpgroup_mma(
        self, left: Any, right: Shared, sums: Any, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        assert is_async
        self._products.append(Product(left, right, sums if use_acc else None))
        return self._products[-1]

    def warpgroup_mma_wait(self, outstanding: int, deps: tuple[Any, ...]) -> Any:
        while len(self._products) > outstanding:
            self._products.pop(0).end()
        given = [each.value if _has_ended(each) else each for each in deps]
        return given[0] if len(given) == 1 else tuple(given)


def _has_ended(each: Any) -> bool:
    return isinstance(each, Product) and each.value is not None

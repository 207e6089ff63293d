"""Experts that run from slots: the same products as those that stay, on other addresses.

Routing happens before the layer's dense MLP, so that what is missing comes while that runs; it is
the same arithmetic wherever it happens. What it gave up: plain weights wait for the device to tell
which slots they are in, as plain experts wait for their counts anyhow.
"""

from typing import Protocol

from torch import Tensor, nn

from ....kernels.experts.ops import choose
from ....kernels.formats import from_tensors
from ....kernels.layouts import PackedWeight
from ....kernels.linear import grouped_linear
from ...model.layers import Experts
from ...model.packed import PackedExperts


class Shelf(Protocol):
    """Who knows which expert lies where; `ExpertCache`."""

    def begin(
        self, place: int, chosen: Tensor, residual: Tensor, following: "SlottedExperts | None"
    ) -> None:
        """Let the experts `chosen` of the layer at `place` come, then those that follow."""
        ...

    def await_slots(self, place: int) -> Tensor:
        """int32 [experts]: the slots of that layer, once what it has chosen is there."""
        ...


class SlottedExperts(Experts):
    """As `Experts`, from stacks of slots, [slots, 2 * inner, hidden] and [slots, hidden, inner].

    Args:
        like: the experts whose weights are in the slots.
        shelf: fills the slots.
        place: of this layer among those with experts.
    """

    def __init__(self, like: Experts, shelf: Shelf, place: int) -> None:
        nn.Module.__init__(self)
        self.active, self.count, self.epsilon = like.active, like.count, like.epsilon
        self.router, self.router_scale = like.router, like.router_scale
        self.expert_scale = like.expert_scale
        self.place = place
        self._shelf = shelf
        self._following: tuple[SlottedExperts, ...] = ()  # no module of this one
        self._routed: tuple[Tensor, Tensor] | None = None
        self._slots: list[int] = []

    def put(self, stacks: list[Tensor], following: "SlottedExperts | None") -> None:
        """Run from these stacks; `following` are the experts of the next layer that has some."""
        self.gate_up, self.down = (nn.Parameter(each, requires_grad=False) for each in stacks)
        self._follow(following)

    def begin(self, residual: Tensor) -> None:
        """Choose experts by `residual` [T, hidden], and let them come."""
        self._routed = super().route(residual)
        following = self._following[0] if self._following else None
        self._shelf.begin(self.place, self._routed[1], residual, following)

    def route(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What `begin` has chosen."""
        assert self._routed is not None, "`begin` comes before"
        routed, self._routed = self._routed, None
        return routed

    def foresee(self, residual: Tensor) -> Tensor:
        """Experts that will be chosen, int64 [T, active], by the residual a layer before."""
        return choose(self.scores(residual), self.expert_scale, self.active)[1]

    def run(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        """See `Experts.run`."""
        self._slots = self._shelf.await_slots(self.place).tolist()
        return super().run(inputs, chosen)

    def expert(self, index: int) -> tuple[Tensor, Tensor]:
        """See `Experts.expert`."""
        return super().expert(self._slots[index])

    def _follow(self, following: "SlottedExperts | None") -> None:
        self._following = () if following is None else (following,)


class SlottedPackedExperts(SlottedExperts):
    """As `PackedExperts`, from stacks of the tensors of both weights."""

    def __init__(self, like: PackedExperts, shelf: Shelf, place: int) -> None:
        super().__init__(like, shelf, place)
        # Not the weights themselves: they would stay on the device.
        self._forms = [
            (own.format, own.rows, own.columns, list(own.tensors())) for own in like.packed
        ]
        self.packed: tuple[PackedWeight, ...] = ()

    def put(self, stacks: list[Tensor], following: SlottedExperts | None) -> None:
        """See `SlottedExperts.put`."""
        left = iter(stacks)
        self.packed = tuple(
            from_tensors(format, rows, columns, {name: next(left) for name in names})
            for format, rows, columns, names in self._forms
        )
        self._follow(following)

    def run(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        """See `Experts.run`."""
        # Of int32 indices brackets would make a copy in int64 first.
        slots = self._shelf.await_slots(self.place).index_select(0, chosen)
        gate_up, down = self.packed
        inner = grouped_linear(inputs, gate_up, slots, gated=True, among=self.count)
        return grouped_linear(inner, down, slots, among=self.count)

"""Parameters whose gradients the replicas of a pipeline sum together, whole or in parts.

When that happens is for `mesh` to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed.device_mesh import DeviceMesh

    from adaptis.execute.world import World

SMALL = 1 << 16  # elements; smaller gradients of a stage are summed in one message


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its values."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place(parameter: Tensor) -> None:
    """Let a gradient lie as its parameter does; torch leaves some as parts of a sum."""
    gradient = parameter.grad
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
        parameter.grad = gradient.redistribute(placements=parameter.placements)


def layout_of(parameter: Tensor) -> str:
    """How a parameter is cut; empty: it is whole."""
    if not isinstance(parameter, DTensor):
        return ""
    return f"{parameter.placements} of {parameter.device_mesh.mesh_dim_names}"


class Unit(ABC):
    """Parameters whose gradients are summed together over the replicas."""

    def __init__(self, data: World, stages: Iterable[int]) -> None:
        self.stages = frozenset(stages)
        self.left = set(self.stages)  # in this step: those whose backwards have not ended
        self.coming: Any = None  # what `wait` waits for
        self._data = data
        self._present = torch.empty(0)  # for each parameter: how many replicas have a gradient
        self._works: list[Any] = []

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """As they are now, whole or in parts; those that are trained."""

    @abstractmethod
    def gather(self) -> None:
        """Start making them whole."""

    @abstractmethod
    def wait(self) -> None:
        """Until they are whole."""

    @abstractmethod
    def free(self) -> None:
        """Keep this rank's part alone."""

    @abstractmethod
    def reduce(self) -> None:
        """Start summing."""

    def finish(self) -> None:
        """Until the sums are there; where no replica has a gradient there is none."""
        for work in self._works:
            work.wait()
        self._works.clear()
        self._unpack()
        for parameter, count in zip(self.parameters(), self._present.tolist(), strict=True):
            if not count:
                parameter.grad = None

    @abstractmethod
    def _unpack(self) -> None:
        """Put sums that came packed in their places."""

    def _complete(self) -> list[nn.Parameter]:
        """The parameters, each with a gradient; `_present` says which ones had it before."""
        parameters = self.parameters()
        device = parameters[0].device if parameters else None
        there = [float(parameter.grad is not None) for parameter in parameters]
        self._present = torch.tensor(there, device=device)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return parameters

    def _sum(self, tensor: Tensor) -> None:
        self._works.append(dist.all_reduce(tensor, group=self._data.group, async_op=True))


class Whole(Unit):
    """Whole on every replica: large gradients are summed where they lie, small ones packed."""

    def __init__(self, data: World, stages: Iterable[int], parameters: list[nn.Parameter]) -> None:
        super().__init__(data, stages)
        self._parameters = parameters
        self._packed: list[tuple[Tensor, list[Tensor]]] = []

    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return self._parameters

    def gather(self) -> None:
        """They are whole."""

    def wait(self) -> None:
        """They are whole."""

    def free(self) -> None:
        """They stay whole."""

    @torch.no_grad()
    def reduce(self) -> None:
        """Start summing, each where it lies or packed with others."""
        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for parameter in self._complete():
            place(parameter)
            gradient = local(cast("Tensor", parameter.grad))
            if gradient.numel() < SMALL:  # the same on all replicas, whatever its layout
                small[gradient.dtype, gradient.device].append(gradient)
            elif gradient.is_contiguous():
                self._sum(gradient)
            else:
                dense = gradient.contiguous()
                self._packed.append((dense, [gradient]))
                self._sum(dense)
        small[self._present.dtype, self._present.device].append(self._present)
        for tensors in small.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            self._packed.append((flat, tensors))
            self._sum(flat)

    @torch.no_grad()
    def _unpack(self) -> None:
        for flat, tensors in self._packed:
            parts = flat.view(-1).split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
        self._packed.clear()


class Sharded(Unit):
    """Layers that lie in parts on the replicas, by torch's `fully_shard`."""

    def __init__(
        self, data: World, mesh: DeviceMesh, stages: Iterable[int], owners: list[nn.Module]
    ) -> None:
        super().__init__(data, stages)
        self._owners = [_View(owner) for owner in owners]
        scalars = {p for owner in self._owners for p in owner.parameters() if not p.dim()}
        self._rest = scalars  # cannot be cut
        self._shards = fully_shard(
            _Shards(self._owners), mesh=mesh, reshard_after_forward=False, ignored_params=scalars
        )
        self._shards.set_gradient_divide_factor(1.0)
        self._shards.set_force_sum_reduction_for_comms(enable=True)
        self._whole = False

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained and can be cut."""
        found = {id(p): p for owner in self._owners for p in owner.parameters()}
        return [p for p in found.values() if p.requires_grad and p not in self._rest]

    def gather(self) -> None:
        """Start making them whole, if they are not."""
        if not self._whole:
            self.coming = self._shards.unshard(async_op=True)
            self._whole = True

    def wait(self) -> None:
        """Until they are whole."""
        if self.coming is not None:
            self.coming.wait()
            self.coming = None

    def free(self) -> None:
        """Keep this rank's part alone."""
        self._shards.reshard()
        self._whole = False

    def reduce(self) -> None:
        """Sum, and keep this rank's part of the sums and of the parameters."""
        self.gather()
        self.wait()
        if self._complete():
            self._sum(self._present)
            probe = torch.zeros((), requires_grad=True)
            cast("nn.Module", self._shards)(probe).backward()
        else:
            self._shards.reshard()
        self._whole = False

    def _unpack(self) -> None:
        """Torch has put them where they belong."""


class _View(nn.Module):
    """The parameters that another module owns itself: the same dictionary of them."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._parameters = owner._parameters


class _Shards(nn.Module):
    """What `fully_shard` is given."""

    def __init__(self, owners: list[_View]) -> None:
        super().__init__()
        self.owners = nn.ModuleList(owners)

    def forward(self, probe: Tensor) -> Tensor:
        return probe.clone()

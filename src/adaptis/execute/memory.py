"""How much memory a step really holds: counted, not estimated, on one rank.

One extra step is run with torch's hooks on saved tensors. After each computation the bytes that
are alive are added up, each storage once: what autograd keeps, what I left for W, and the inputs
of recomputed stages; on top of parameters, gradients and the optimizer's state. Workspace inside
an operation is not seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from adaptis.execute.session import Session
    from adaptis.measure.stage import Microbatch


class _Held:
    """A tensor that autograd keeps; leaves the books when autograd lets go of it."""

    __slots__ = ("books", "tensor")

    def __init__(self, tensor: Tensor, books: dict[int, Tensor]) -> None:
        self.tensor, self.books = tensor, books
        books[id(self)] = tensor

    def __del__(self) -> None:
        self.books.pop(id(self), None)


def peak_bytes(session: Session, batch: Sequence[Microbatch]) -> int:
    """The peak of one more training step on this rank, bytes; every rank calls this."""
    owned = {p.untyped_storage().data_ptr() for p in session.parameters.values()}
    books: dict[int, Tensor] = {}
    peak = 0

    def pack(tensor: Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in owned else _Held(tensor, books)

    def unpack(kept: Any) -> Tensor:
        return kept.tensor if isinstance(kept, _Held) else kept

    def watch() -> None:
        nonlocal peak
        tensors = [*books.values()]
        for stage in session.stages.values():
            tensors += stage.held()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        peak = max(peak, sum(size for pointer, size in storages.items() if pointer not in owned))

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        session.step(batch, watch)
    return peak + _static_bytes(session)


def _static_bytes(session: Session) -> int:
    """Parameters, gradients (as large as what is trained) and the optimizer's state."""

    def size(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    total = sum(size(p) * (2 if p.requires_grad else 1) for p in session.parameters.values())
    if session.optimizer is not None:
        for state in session.optimizer.state.values():
            total += sum(size(v) for v in state.values() if isinstance(v, torch.Tensor))
    return total

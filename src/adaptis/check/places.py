"""How instructions are named in messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptis.program import Layout, Program

Position = tuple[int, int]  # device, index in its program


def where(program: Program, position: Position) -> str:
    """How a position is named in messages."""
    device, index = position
    return f"device {device}, position {index}: {program.devices[device][index]}"


def there_are(layout: Layout) -> str:
    """How many stages and micro-batches there are."""
    head = " and the head" if layout.reductions else ""
    return f"there are {layout.num_stages} stages{head} and {layout.num_microbatches} micro-batches"

"""No deadlock: one run decides for all, since the moves of a program commute."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from adaptis.check.places import where
from adaptis.errors import DeadlockError

if TYPE_CHECKING:
    from adaptis.check.places import Position
    from adaptis.program import Program


class Events:
    """What one device posts and what it waits for, in its order.

    A wait's place is the instruction that waits, inverted (~); a post's the one that must have
    ended. A token names what is waited for: a number above 0 one end of a transfer, or what is
    handed out to all; one below 0 a group of joins.
    """

    def __init__(self) -> None:
        self.places: list[int] = []
        self.tokens: list[int] = []

    def post(self, index: int, token: int) -> None:
        """Note a post."""
        self.places.append(index)
        self.tokens.append(token)

    def wait(self, index: int, token: int) -> None:
        """Note a wait."""
        self.places.append(~index)
        self.tokens.append(token)


def no_deadlock(program: Program, events: list[Events]) -> None:
    """Let every device go on until it waits for what was not posted; all must come to their end."""
    devices = range(len(events))
    done = [0 for _ in devices]
    missing: dict[int, int] = defaultdict(lambda: len(events))  # joins of a group
    posted: set[int] = set()
    waiting: dict[int, list[int]] = defaultdict(list)
    ready = [*devices]
    while ready:
        device = ready.pop()
        places, tokens = events[device].places, events[device].tokens
        index = done[device]
        while index < len(places):
            token = tokens[index]
            if places[index] < 0:
                if token not in posted:
                    waiting[token].append(device)
                    break
            elif token > 0 or missing[token] == 1:
                posted.add(token)
                ready += waiting.pop(token, ())
            else:
                missing[token] -= 1
            index += 1
        done[device] = index
    stuck = [device for device in devices if done[device] < len(events[device].places)]
    if stuck:
        lines = tuple(where(program, node) for node in _cycle(events, done, stuck[0]))
        raise DeadlockError(
            f"{len(lines)} instructions wait for each other in a circle: "
            + " <- ".join((*lines, lines[0])),
            lines,
        )


def _cycle(events: list[Events], done: list[int], device: int) -> list[Position]:
    """A cycle in the order of waiting: who waits, then who has to post, back to where it waits."""
    path: list[Position] = []
    begins: dict[int, int] = {}  # where the part of each device ends in the path
    late = -1  # the instruction of `device` that has to end
    while True:
        at = ~events[device].places[done[device]]
        path += [(device, index) for index in range(max(late, at), at - 1, -1)]
        if device in begins:
            return path[begins[device] :]
        begins[device] = len(path)
        token = events[device].tokens[done[device]]
        device, late = next(
            (other, place)
            for other, row in enumerate(events)
            for place, posts in zip(
                row.places[done[other] :], row.tokens[done[other] :], strict=True
            )
            if posts == token and place >= 0
        )

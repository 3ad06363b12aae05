"""What a learning-rate schedule moves, in a checkpoint: its own state and the optimizer's settings.

Kept as JSON, whose numbers come back exactly. Settings that are no numbers, such as "fused", are
those of the run that goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from adaptis.errors import InputError

if TYPE_CHECKING:
    from adaptis.execute.session import Session
    from adaptis.execute.storage import Checkpoint

GROUPS, SCHEDULE = "groups", "schedule"


def kept(session: Session) -> dict[str, Any]:
    """What a checkpoint holds of a session with an optimizer; the same on every rank that has one.

    Raises:
        InputError: the schedule's state holds what JSON cannot.
    """
    optimizer, schedule = session.optimizer, session.schedule
    assert optimizer is not None
    groups = [
        {key: value for key, value in map(_setting, group.items()) if value is not None}
        for group in optimizer.param_groups
    ]
    found: dict[str, Any] = {GROUPS: groups}
    if schedule is not None:
        found[SCHEDULE] = _packed(schedule.state_dict(), type(schedule).__name__)
    return found


def _setting(item: tuple[str, Any]) -> tuple[str, Any]:
    """A setting that is a number or several; None for any other."""
    key, value = item
    numbers = [float(value)] if isinstance(value, torch.Tensor) else value
    numbers = list(numbers) if isinstance(numbers, list | tuple) else [numbers]
    good = key != "params" and all(type(number) in (int, float) for number in numbers)
    several = isinstance(value, list | tuple)
    return key, (numbers if several else numbers[0]) if good and numbers else None


def restore(session: Session, found: Checkpoint) -> None:
    """Go on with the settings that were saved.

    Raises:
        InputError: there was another number of groups, or a schedule on one side alone.
    """
    optimizer, schedule = session.optimizer, session.schedule
    assert optimizer is not None
    saved = found.values.get(GROUPS)
    if saved is None:  # no rank had an optimizer
        return
    count = len(optimizer.param_groups)
    if len(saved) != count and schedule is None and all(one == saved[0] for one in saved):
        saved = saved[:1] * count  # a mesh makes groups of its own, with the same settings
    if len(saved) != count:
        raise InputError(
            f"{found.path}: holds {len(saved)} groups of parameters, the optimizer has "
            f"{count}; resume with the optimizer that was saved"
        )
    if (SCHEDULE in found.values) != (schedule is not None):
        there, here = ("a", "none") if schedule is None else ("no", "one")
        raise InputError(
            f"{found.path}: holds {there} learning-rate schedule, this run has {here}; resume with "
            f"the same schedule"
        )
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        for key, value in settings.items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value
    if schedule is not None:
        schedule.load_state_dict(_unpacked(found.values[SCHEDULE]))


def _packed(value: Any, name: str) -> Any:
    """As JSON: a mapping becomes a list of pairs, as its keys may be numbers."""
    if isinstance(value, dict):
        return {"pairs": [[key, _packed(item, name)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_packed(item, name) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        f"the state of the schedule {name} holds a {type(value).__name__}, which a checkpoint "
        f"cannot; use one whose state consists of numbers and texts"
    )


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value["pairs"]}
    return [_unpacked(item) for item in value] if isinstance(value, list) else value

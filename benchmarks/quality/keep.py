"""Results that are kept between runs and shared between processes.

A result is kept under a key that names its case, its time and the sources that it depends on: what
has changed is computed anew, what has not is read. A case is taken by creating its claim; the claim
of a process that has died does not count.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptis.files import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
KEPT = Path(tempfile.gettempdir()) / "adaptis-plan-quality" / "results"


@cache
def digest(*patterns: str) -> str:
    """A short id of all files of the repository that match."""
    found = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    joined = hashlib.sha256()
    for path in found:
        joined.update(path.read_bytes())
    return joined.hexdigest()[:12]


def path_of(key: str) -> Path:
    """Where the result of `key` is kept."""
    return KEPT / f"{key}.json"


def kept(key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `key`, made now if there is none."""
    path = path_of(key)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return read_json(path, "kept result")


@contextmanager
def claimed(name: str) -> Iterator[bool]:
    """Whether this process, and no other that lives, has the case `name`."""
    path = KEPT / f"{name}.claim"
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = _claim(path)
    try:
        yield mine
    finally:
        if mine:
            path.unlink(missing_ok=True)


def _claim(path: Path) -> bool:
    for _ in range(2):
        try:
            with path.open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            if _alive(path):
                return False
            path.unlink(missing_ok=True)
        else:
            return True
    return False


def _alive(path: Path) -> bool:
    """Whether the owner of a claim still runs."""
    try:
        os.kill(int(path.read_text()), 0)
    except (ProcessLookupError, ValueError, FileNotFoundError):
        return False
    except PermissionError:
        return True
    return True

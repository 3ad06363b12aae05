"""Reading and writing the files that people share: strict JSON, and nothing else.

Files are untrusted input. Duplicate keys, unknown keys, NaN, wrong types and oversized files are
refused with one sentence that names the file and the key; nothing read here can run code. What the
values mean is the business of the type that asks for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from adaptis.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")
MAX_FILE_BYTES = 1 << 30
_MISSING = object()
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    bool: "true or false",
}


def read_json(path: str | Path, what: str = "file") -> dict[str, Any]:
    """The JSON object in `path`, or one sentence why there is none."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(
                f"{path}: {size} bytes is too large for a {what} (at most {MAX_FILE_BYTES})"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what}; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, a {what} is needed") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text, a {what} in JSON is needed") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json(text, str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The JSON object in `text`; `where` names its origin in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise InputError(f"{where}: the key {key!r} appears twice in one object; keep one")
            result[key] = value
        return result

    def finite(text: str) -> float:
        number = float(text)
        return number if abs(number) <= sys.float_info.max else refuse(text)

    def refuse(constant: str) -> float:
        raise InputError(
            f"{where}: {constant} is not a number that JSON knows; give a finite number"
        )

    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite
        )
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: line {error.lineno}, column {error.colno}: not JSON ({error.msg.lower()})"
        ) from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply to be one of our files") from None
    except ValueError:
        raise InputError(f"{where}: holds a number with too many digits") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds {_name_of(value)}, a JSON object is needed")
    return value


def write_json(path: str | Path, value: dict[str, Any], indent: int | None = 1) -> None:
    """Write atomically: readers see the old file or the new one, never half of one."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write atomically, making the folder where needed."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write atomically, making the folder where needed."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


class Fields:
    """The keys of one JSON object, taken one by one; `done` refuses what nobody took."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise InputError(f"{where}: {_name_of(value)} where an object is needed")
        self._left: dict[str, Any] = dict(cast("dict[str, Any]", value))
        self.where = where

    def _absent(self, key: str, default: object) -> bool:
        """Whether the default stands for `key`; no default and no key is an error."""
        if key in self._left:
            return False
        if default is _MISSING:
            raise InputError(f"{self.where}: the key {key!r} is missing")
        return True

    def take(self, key: str, kind: type[T], default: object = _MISSING) -> T:
        """The value of `key`, which must be exactly of `kind` (a bool is no integer)."""
        if self._absent(key, default):
            return cast("T", default)
        value = self._left.pop(key)
        if type(value) is not kind:
            raise InputError(
                f"{self.where}: {key!r} is {_name_of(value)}, {_NAMES[kind]} is needed"
            )
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise InputError(f"{self.where}: {key!r} holds half a character") from None
        return cast("T", value)

    def number(self, key: str, default: object = _MISSING, least: float = 0.0) -> float:
        """A finite number >= `least`."""
        if self._absent(key, default):
            return cast("float", default)
        value = self._left.pop(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{self.where}: {key!r} is {_name_of(value)}, a number is needed")
        if not abs(value) <= sys.float_info.max or value < least:
            raise InputError(f"{self.where}: {key!r} is {value}, at least {least:g} is needed")
        return float(value)

    def count(self, key: str, default: object = _MISSING, least: int = 0) -> int:
        """An integer >= `least`."""
        if self._absent(key, default):
            return cast("int", default)
        value = self.take(key, int)
        if not least <= value < 1 << 62:
            raise InputError(f"{self.where}: {key!r} is {value}, an integer >= {least} is needed")
        return value

    def objects(self, key: str) -> Iterator[Fields]:
        """Each object in the list `key`."""
        for index, value in enumerate(self.take(key, list)):
            yield Fields(value, f"{self.where}: {key}[{index}]")

    def format(self, name: str, version: int) -> None:
        """Refuse files of another format or of a version that this program does not know."""
        found = self.take("format", str)
        if found != name:
            raise InputError(f"{self.where}: the format is {found!r}, {name!r} is needed")
        number = self.count("version", least=1)
        if number > version:
            raise InputError(
                f"{self.where}: version {number} of {name} is newer than this program knows "
                f"(up to {version}); update adaptis"
            )

    def done(self) -> None:
        """Refuse the keys that nobody took."""
        if self._left:
            raise InputError(
                f"{self.where}: unknown key {sorted(self._left)[0]!r}; remove it or fix its "
                f"spelling"
            )


def _name_of(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return "a fraction"
    kind: type = type(value)
    return _NAMES.get(kind, kind.__name__)

"""Tensors in files that are whole or refused: how a checkpoint lies on the disk.

    checkpoints/step-000041/     rank-0.safetensors  rank-1.safetensors  MANIFEST.json
    checkpoints/.step-000042.tmp/            the next one, while it is written

The manifest lists every file, every tensor in it with the SHA-256 of the very bytes that were
written, and is sealed by its own. It is written last, into a temporary folder, which one rename
makes the newest checkpoint; nothing that is whole is ever overwritten. Nothing is pickled. This
module knows nothing of sessions or ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adaptis.errors import InputError
from adaptis.files import Fields, parse_json, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

FORMAT, VERSION = "adaptis-checkpoint", 2
MANIFEST = "MANIFEST.json"
KEEP = 2  # checkpoints that stay
CHUNK = 1 << 24  # bytes that are hashed and written at a time
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file through to the disk; its entry for the manifest.

    Args:
        path: of a new file.
        tensors: contiguous, on the CPU.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    index: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.nbytes
        index[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(index).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    header = struct.pack("<Q", len(text)) + text
    entry = {"name": path.name, "bytes": len(header) + end, "header_bytes": len(header)}
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        entry["sha256"] = _write(handle, memoryview(header))
        for name, tensor in ordered.items():
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            index[name]["sha256"] = _write(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)
    return entry | {"tensors": index}


def _write(handle: int, data: memoryview) -> str:
    """Write all of it; its SHA-256."""
    digest, done = hashlib.sha256(), 0
    while done < len(data):
        count = os.write(handle, data[done : done + CHUNK])
        digest.update(data[done : done + count])
        done += count
    return digest.hexdigest()


def sync(folder: Path) -> None:
    """What was created or renamed in `folder` is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prepare(folder: Path, temporary: Path) -> None:
    """An empty temporary folder; what earlier saves left behind when they were cut off is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    sync(folder.parent)
    for left in folder.glob(".step-*.tmp"):
        shutil.rmtree(left)
    temporary.mkdir()


def publish(temporary: Path, folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Seal what lies in `temporary` and make it the newest checkpoint in `folder`; its path."""
    known = ordered_checkpoints(folder)
    order = 1 + max((order for order, _ in known), default=0)
    name = f"step-{manifest['step']:06d}"
    target = folder / name
    while target.exists():  # nothing is overwritten
        target = folder / f"{name}.{order}"
        order += 1
    body = {"format": FORMAT, "version": VERSION, "order": order, **manifest}
    handle = os.open(temporary / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _write(handle, memoryview(_sealed(body)))
        os.fsync(handle)
    finally:
        os.close(handle)
    sync(temporary)
    temporary.rename(target)
    sync(folder)
    with contextlib.suppress(OSError):  # the new one is safe, what is left goes the next time
        for _, old in known[KEEP - 1 :]:
            hidden = folder / f".{old.name}.tmp"
            old.rename(hidden)  # so that nobody ever sees half of it
            shutil.rmtree(hidden)
    return target


def ordered_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """All checkpoints in `folder` as (order, path), the newest first; damaged ones have order 0."""
    found = []
    for path in folder.glob("step-*"):
        try:
            found.append((Checkpoint(path).order, path))
        except InputError:
            found.append((0, path))
    return sorted(found, reverse=True)


def _sealed(body: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({"sha256": digest, "manifest": body}, indent=1).encode()


@dataclass(frozen=True, slots=True)
class Slice:
    """Where a tensor lies and what its bytes must be."""

    path: Path
    offset: int  # bytes
    num_bytes: int
    sha256: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, verified.

        Raises:
            InputError: its bytes are not those that were written.
        """
        data = bytearray(self.num_bytes)
        _read(self.path, self.offset, memoryview(data), self.sha256)
        return self._tensor(data, self.shape)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor, all of which is verified but never in memory at once.

        Raises:
            InputError: its bytes are not those that were written.
        """
        each = self.num_bytes // self.shape[0]
        data, digest, done = bytearray(), hashlib.sha256(), 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while done < self.num_bytes:
                chunk = file.read(min(CHUNK, self.num_bytes - done))
                if not chunk:
                    break
                digest.update(chunk)
                data += chunk[max(0, start * each - done) : max(0, stop * each - done)]
                done += len(chunk)
        if digest.hexdigest() != self.sha256:
            raise _damaged(self.path)
        return self._tensor(data, (stop - start, *self.shape[1:]))

    def _tensor(self, data: bytearray, shape: tuple[int, ...]) -> Tensor:
        if not data:
            return torch.empty(shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(shape)


class Checkpoint:
    """A checkpoint whose manifest is verified; its tensors are when they are read."""

    def __init__(self, path: Path) -> None:
        """Read the manifest.

        Raises:
            InputError: it is damaged, or a file is missing or cut short.
        """
        self.path = path
        file = path / MANIFEST
        value = read_json(file, "checkpoint manifest")
        body = Fields(value, str(file)).take("manifest", dict)
        if _sealed(body) != file.read_bytes():
            raise _damaged(file)
        fields = Fields(parse_json(json.dumps(body), str(file)), str(file))
        fields.format(FORMAT, VERSION)
        self.order = fields.count("order")
        self.model = fields.take("model", str)
        self.step = fields.count("step")
        self.seed = fields.count("seed")
        self.optimizer = fields.take("optimizer", str)
        self.values = fields.take("values", dict)  # what is no tensor in the optimizer's state
        self.tensors: dict[str, Slice] = {}
        self._headers = [self._open(entry) for entry in fields.objects("files")]
        fields.done()

    def _open(self, entry: Fields) -> tuple[Path, int, str]:
        path = self.path / Path(entry.take("name", str)).name
        header, size = entry.count("header_bytes"), entry.count("bytes")
        if not path.is_file() or path.stat().st_size != size:
            raise InputError(f"{path}: is missing or cut short; use another checkpoint")
        for name, value in entry.take("tensors", dict).items():
            part = _slice(path, header, Fields(value, f"{entry.where}: {name}"))
            if part.offset + part.num_bytes > size:
                raise InputError(f"{path}: {name} lies behind its end; use another checkpoint")
            self.tensors[name] = part
        return path, header, entry.take("sha256", str)

    def verify(self) -> None:
        """Read everything once.

        Raises:
            InputError: a bit is not as it was written.
        """
        for path, size, sha256 in self._headers:
            _read(path, 0, memoryview(bytearray(size)), sha256)
        for part in self.tensors.values():
            part.read()

    def named(self, kind: str) -> Iterator[tuple[str, Slice]]:
        """The tensors of "param", "buffer" or "optimizer" by their names behind it."""
        for name, part in self.tensors.items():
            if name.startswith(f"{kind}/"):
                yield name.removeprefix(f"{kind}/"), part


def _slice(path: Path, header: int, entry: Fields) -> Slice:
    kind, shape = entry.take("dtype", str), entry.take("shape", list)
    place, sha256 = entry.take("data_offsets", list), entry.take("sha256", str)
    dtype = _TORCH.get(kind)
    if dtype is None:
        raise InputError(f"{entry.where}: the type {kind} is not known; update adaptis")
    numbers = [*shape, *place]
    if not all(type(number) is int and number >= 0 for number in numbers) or len(place) != 2:
        raise InputError(f"{entry.where}: sizes are no integers >= 0; use another checkpoint")
    size = place[1] - place[0]
    if size != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{entry.where}: its sizes do not agree; use another checkpoint")
    return Slice(path, header + place[0], size, sha256, dtype, tuple(shape))


def _read(path: Path, offset: int, data: memoryview, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            count = file.readinto(data)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); use another checkpoint"
        ) from None
    if count != len(data) or hashlib.sha256(data).hexdigest() != sha256:
        raise _damaged(path)


def _damaged(path: Path) -> InputError:
    return InputError(f"{path}: is damaged: its SHA-256 differs; use another checkpoint")


def newest(folder: Path) -> Path:
    """The newest checkpoint in `folder` that is whole to the last bit; `folder` may be one itself.

    Raises:
        InputError: there is none, saying what is wrong with the newest.
    """
    first = ""
    for path in candidates(folder):
        try:
            Checkpoint(path).verify()
        except InputError as error:
            first = first or str(error)
            continue
        return path
    raise InputError(first or nothing(folder))


def candidates(folder: Path) -> list[Path]:
    """Where to look for a checkpoint, the newest first."""
    if (folder / MANIFEST).exists():
        return [folder]
    return [path for _, path in ordered_checkpoints(folder)]


def nothing(folder: Path) -> str:
    """That there is no checkpoint at all."""
    return f"{folder}: holds no checkpoint; train without --resume first"

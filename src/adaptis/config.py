"""The training file: TOML into typed, frozen sections, with `--section.key value` on top.

The dataclasses below are the one schema: their fields are the keys, their defaults the defaults.
Unknown keys and wrong types are refused by name.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from adaptis.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class ModelSection:
    """What is trained."""

    preset: str = (
        "demo-hybrid"  # a preset's name, or the path of a preset or of a Hugging Face config.json
    )
    weights: str = ""  # a folder of transformers' save_pretrained to start from; empty: none


@dataclass(frozen=True, slots=True)
class DataSection:
    """On which text; what is empty or 0 is as the preset has it."""

    text: str = ""  # a file or a folder of text; empty: the Python standard library's sources
    tokenizer: str = ""  # "bpe" (trained at first use), "bytes", or the path of a tokenizer.json
    vocabulary: int = 0  # of the trained tokenizer
    sequence: int = 0  # tokens
    batch_size: int = 0  # sequences in a micro-batch


@dataclass(frozen=True, slots=True)
class TrainSection:
    """How."""

    devices: int = 2  # processes
    replicas: int = 1  # of the pipeline: devices / replicas are one, with its own micro-batches
    device: str = "cpu"  # or "cuda": each process on a GPU; not yet run on hardware
    microbatches: int = 8  # of each replica
    steps: int = 20
    learning_rate: float = 1e-3
    max_norm: float = 0.0  # gradients are clipped to this global norm; 0: they are not
    autocast: str = ""  # "bfloat16": products are computed in it; empty: in the weights' type
    seed: int = 0
    plan: str = "auto"  # or the path of a plan
    search_seconds: float = 5.0
    folder: str = "adaptis-runs/train"
    save_every: int = 0  # steps between checkpoints; 0: at the end only
    resume: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    """One training run."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)


_SECTIONS = {"model": ModelSection, "data": DataSection, "train": TrainSection}
_KINDS = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
_LEAST = {
    ("train", "devices"): 1,
    ("train", "replicas"): 1,
    ("train", "microbatches"): 1,
    ("train", "steps"): 1,
    ("train", "seed"): 0,
    ("train", "save_every"): 0,
    ("train", "search_seconds"): 0,
    ("train", "learning_rate"): 0,
    ("train", "max_norm"): 0,
    ("data", "vocabulary"): 0,
    ("data", "sequence"): 0,
    ("data", "batch_size"): 0,
}
_WORDS = ("plan", "folder", "preset")  # strings that cannot be empty
_CHOICES = {"autocast": ("", "bfloat16"), "device": ("cpu", "cuda")}


def load_config(path: str | Path | None, overrides: dict[str, str] | None = None) -> Config:
    """Read a training file, then apply overrides such as {"train.steps": "50"}.

    Raises:
        InputError: one sentence that names the key, what was found and what is needed.
    """
    value = {} if path is None else _read(path)
    where = str(path) if path is not None else "the options"
    for key, text in (overrides or {}).items():
        section, dot, name = key.partition(".")
        if not dot:
            raise InputError(
                f"--{key}: no such option; keys of the training file are given as --section.key"
            )
        entries = value.setdefault(section, {})
        if isinstance(entries, dict):
            entries[name] = _parsed(text, section, name)
    unknown = sorted(value.keys() - _SECTIONS.keys())
    if unknown:
        kind = f"section [{unknown[0]}]" if isinstance(value[unknown[0]], dict) else unknown[0]
        raise InputError(f"{where}: unknown {kind}; there are [{'], ['.join(_SECTIONS)}]")
    return Config(**{name: _section(name, value.get(name, {}), where) for name in _SECTIONS})


def _read(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a training file in TOML"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text; give a training file in TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is no TOML ({error}); correct that line") from None
    except (RecursionError, ValueError):
        raise InputError(f"{path}: is no training file; give sections of plain keys") from None


def _parsed(text: str, section: str, name: str) -> Any:
    """An option's text as TOML reads it; a bare word is a string, as is what must be one."""
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except (tomllib.TOMLDecodeError, ValueError, RecursionError):
        return text
    kind = _SECTIONS.get(section)
    wanted = get_type_hints(kind).get(name) if kind else None
    return text if wanted is str and not isinstance(value, str) else value


def _section(name: str, value: object, where: str) -> Any:
    kind = _SECTIONS[name]
    if not isinstance(value, dict):
        raise InputError(f"{where}: {name} is {value!r}, a section [{name}] is needed")
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    result = {}
    for key, given in value.items():
        if key not in known:
            raise InputError(
                f"{where}: unknown key {key!r} in [{name}]; there are {', '.join(known)}"
            )
        result[key] = _item(f"{where}: {name}.{key}", given, hints[key], _LEAST.get((name, key)))
        if key in _WORDS and not result[key]:
            raise InputError(f"{where}: {name}.{key} is empty; give one, or leave the key out")
        if result[key] not in _CHOICES.get(key, (result[key],)):
            raise InputError(
                f"{where}: {name}.{key} is {given!r}; give {_CHOICES[key][1]}, or leave the key out"
            )
    return kind(**result)


def _item(where: str, given: Any, wanted: Any, least: float | None) -> Any:
    """The value of one key, checked."""
    item = given
    if wanted is float and type(given) is int and abs(given) < 1e300:
        item = float(given)
    if type(item) is not wanted or (wanted is float and not math.isfinite(item)):
        raise InputError(f"{where} is {given!r}, {_KINDS[wanted]} is needed")
    if least is not None and item < least:
        raise InputError(f"{where} is {item}, at least {least} is needed")
    if wanted is int and item >= 1 << 62:
        raise InputError(f"{where} is {item}, a smaller integer is needed")
    return item


def parse_words(words: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The training file, if one is named, and `--section.key value` or `--section.key=value`.

    Raises:
        InputError: a word that is neither.
    """
    path: str | None = None
    overrides: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            if path is not None:
                raise InputError(f"{word}: unexpected, {path} is the training file already")
            path = word
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        if "." not in key or not word.startswith("--"):
            raise InputError(
                f"{word}: no such option; keys of the training file are given as "
                f"--section.key value"
            )
        if not equals:
            if not left or left[0].startswith("--"):
                raise InputError(f"{word}: a value is missing")
            value = left.pop(0)
        overrides[key] = value
    return path, overrides

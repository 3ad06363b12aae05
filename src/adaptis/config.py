"""The training file: TOML into typed, frozen sections, with `--section.key value` on top.

The dataclasses below are the one schema: their fields are the keys, their defaults the defaults.
Unknown keys and wrong types are refused by name.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class DataSection:
    """On which text."""

    text: str = ""  # a file or a folder of text; empty: the Python standard library's sources
    tokenizer: str = "bpe"  # "bpe" (trained at first use), "bytes", or the path of a tokenizer.json
    vocabulary: int = 8192  # of the trained tokenizer
    sequence: int = 256  # tokens
    batch_size: int = 1  # sequences in a micro-batch


@dataclass(frozen=True, slots=True)
class TrainSection:
    """How."""

    devices: int = 2
    microbatches: int = 8
    steps: int = 20
    learning_rate: float = 1e-3
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
_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
_LEAST = {
    ("train", "devices"): 1,
    ("train", "microbatches"): 1,
    ("train", "steps"): 1,
    ("train", "save_every"): 0,
    ("train", "search_seconds"): 0,
    ("train", "learning_rate"): 0,
    ("data", "sequence"): 1,
    ("data", "batch_size"): 1,
    ("data", "vocabulary"): 257,
}


def load_config(path: str | Path | None, overrides: dict[str, str] | None = None) -> Config:
    """Read a training file, then apply overrides such as {"train.steps": "50"}.

    Raises:
        InputError: one sentence that names the key, what was found and what is needed.
    """
    value: dict[str, Any] = {}
    if path is not None:
        try:
            value = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); give a training file in TOML"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: is no TOML: {error}") from None
    for key, text in (overrides or {}).items():
        section, dot, name = key.partition(".")
        if not dot:
            raise InputError(
                f"--{key}: no such option; keys of the training file are given as --section.key"
            )
        entries = value.setdefault(section, {})
        if isinstance(entries, dict):
            entries[name] = _parsed(text)
    where = str(path) if path is not None else "the options"
    unknown = sorted(value.keys() - _SECTIONS.keys())
    if unknown:
        raise InputError(
            f"{where}: unknown section [{unknown[0]}]; there are {', '.join(_SECTIONS)}"
        )
    return Config(**{name: _section(name, value.get(name, {}), where) for name in _SECTIONS})


def _parsed(text: str) -> Any:
    """An option's text as TOML reads it; a bare word is a string."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _section(name: str, value: object, where: str) -> Any:
    kind = _SECTIONS[name]
    if not isinstance(value, dict):
        raise InputError(f"{where}: [{name}] must be a section")
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    result = {}
    for key, given in value.items():
        if key not in known:
            raise InputError(
                f"{where}: unknown key {key!r} in [{name}]; there are {', '.join(known)}"
            )
        wanted = hints[key]
        item = float(given) if wanted is float and type(given) is int else given
        if type(item) is not wanted:
            raise InputError(f"{where}: {name}.{key} is {item!r}, {_KINDS[wanted]} is needed")
        least = _LEAST.get((name, key))
        if least is not None and item < least:
            raise InputError(f"{where}: {name}.{key} is {item}, at least {least} is needed")
        result[key] = item
    return kind(**result)


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """`--section.key value` and `--section.key=value` as a dictionary."""
    result: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise InputError(
                f"{word}: unexpected; options of the training file are given as --section.key value"
            )
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not left or left[0].startswith("--"):
                raise InputError(f"{word}: a value is missing")
            value = left.pop(0)
        result[key] = value
    return result

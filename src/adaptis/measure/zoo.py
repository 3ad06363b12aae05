"""Models by name: the presets that come with AdaPtis, and files of the same form.

A preset is a TOML file whose table `config` holds the keys of a Hugging Face `config.json` (those
that are null there, in the list `none`); its table `data` says what text and micro-batches suit it.
This module knows nothing about how a model is built.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptis.errors import InputError
from adaptis.files import Fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptis.measure.huggingface import HuggingFaceModel


@dataclass(frozen=True, slots=True)
class Preset:
    """A model and the micro-batches that suit it."""

    name: str
    about: str  # one line
    config: Mapping[str, Any] = field(repr=False)  # as in a config.json
    tokenizer: str = "bytes"  # as `corpus.load_corpus` takes it
    vocabulary: int = 8192
    sequence: int = 256
    batch_size: int = 1

    def model(self) -> HuggingFaceModel:
        """The model, not built yet.

        Raises:
            InputError: if transformers refuses the configuration.
        """
        from adaptis.measure.huggingface import HuggingFaceModel

        return HuggingFaceModel(self.config, self.name)


def preset_names() -> list[str]:
    """The presets that come with AdaPtis."""
    folder = resources.files("adaptis.measure") / "presets"
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def read_preset(name_or_path: str | Path) -> Preset:
    """The preset of this name, or in this TOML file, or for this `config.json`.

    Raises:
        InputError: if there is none, or it is not of that form.
    """
    given = str(name_or_path)
    if given in preset_names():
        text = (resources.files("adaptis.measure") / "presets" / f"{given}.toml").read_text("utf-8")
        return _from_toml(text, given, given)
    path = Path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"{given!r} is neither a preset ({', '.join(preset_names())}) nor a readable file; "
            "give one of them"
        ) from None
    if path.suffix == ".toml":
        return _from_toml(text, path.stem, given)
    try:
        config = json.loads(text)  # others write these files: NaN and Infinity occur
    except ValueError as error:
        raise InputError(f"{given}: is no JSON ({error}); a config.json is needed") from None
    if not isinstance(config, dict):
        raise InputError(f"{given}: a JSON object is needed, as in a config.json")
    name = path.parent.name if path.name == "config.json" else path.stem
    return Preset(name or path.stem, "", config)


def load_preset(name_or_path: str | Path) -> HuggingFaceModel:
    """The model of a preset, a TOML file of that form, or a `config.json`.

    Raises:
        InputError: if there is none, or transformers refuses it.
    """
    return read_preset(name_or_path).model()


def _from_toml(text: str, name: str, where: str) -> Preset:
    try:
        fields = Fields(tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: is no TOML ({error}); correct that line") from None
    about = fields.take("about", str, "")
    config = fields.take("config", dict) | dict.fromkeys(fields.take("none", list, []))
    data = Fields(fields.take("data", dict, {}), f"{where}: data")
    fields.done()
    preset = Preset(
        name,
        about,
        config,
        tokenizer=data.take("tokenizer", str, "bytes"),
        vocabulary=data.count("vocabulary", 8192, least=1),
        sequence=data.count("sequence", 256, least=1),
        batch_size=data.count("batch_size", 1, least=1),
    )
    data.done()
    return preset

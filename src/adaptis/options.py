"""What the verbs of the command line share: their options, and how they end."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
ProfileFile = Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile file.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")]
Devices = Annotated[int | None, typer.Option(help="How many devices; default: the profile's hint.")]
Microbatches = Annotated[
    int | None, typer.Option(help="Micro-batches per step; default: the profile's hint.")
]
Counts = Annotated[
    str | None,
    typer.Option(
        "--microbatches",
        metavar="N or N-N",
        help="Micro-batches per step; default: the profile's hint. A range such as 4-16 asks how "
        "many to cut one batch into: 16 are of the profile's size, 8 and 4 of two and four times "
        "it. Times are scaled in proportion: what smaller ones lose on a real device is not "
        "modelled, so profile at the size that was chosen.",
    ),
]
ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", help="A cluster file: devices and links.")
]
Memory = Annotated[float | None, typer.Option("--memory-gib", help="Memory of each device, GiB.")]
Seconds = Annotated[float, typer.Option(help="How long to search.")]
Seed = Annotated[int, typer.Option(help="Of the search.")]
ShardHead = Annotated[
    str,
    typer.Option(
        metavar="never|auto|always",
        help="Deal the vocabulary head out to all devices; training cannot run that yet.",
    ),
]


def emit(value: dict[str, Any], as_json: bool) -> bool:
    """Print `value` if JSON was asked for; whether it was."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
    return as_json


def next_command(*words: object) -> None:
    """What to do next, as a command that can be pasted."""
    from adaptis.console import warn

    warn(f"next: {' '.join(['adaptis', *(shlex.quote(str(word)) for word in words)])}")


def flags(**values: object) -> list[object]:
    """The options that were given, as words of a command."""
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in values.items())
    return [word for name, value in pairs if value is not None for word in (name, value)]

"""Every error that a user can cause, as one tree.

Each message says what was found, what was needed and what to do, in one sentence; the command line
prints it as it is and exits with the class's status: 1 is a clear "no", 2 is bad input. ::

    Error (2)
    ├── InputError (2)          a file, flag or configuration that cannot be read
    ├── ProfileError (2)        a profile that does not describe this model or machine
    ├── PlanError (2)           a plan that is no plan, or is for something else
    ├── InfeasibleError (1)     nothing fits: the tightest device and what it misses
    ├── ProgramError (1)        a program that `check` refuses
    │   └── DeadlockError (1)   with the cycle, instruction by instruction
    └── RankError (1)           a process of the run failed: which, where, why
"""

from __future__ import annotations


class Error(Exception):
    """The root: catch this to catch everything that AdaPtis raises on purpose."""

    exit_status = 2


class InputError(Error):
    """A file, flag or configuration is not what it has to be."""


class ProfileError(Error):
    """A profile does not describe this model or this machine."""


class PlanError(Error):
    """A decision is invalid, or a plan belongs to something else."""


class InfeasibleError(Error):
    """No plan fits the memory that is there."""

    exit_status = 1

    def __init__(self, message: str, device: int = -1, missing_bytes: int = 0) -> None:
        super().__init__(message)
        self.device = device
        self.missing_bytes = missing_bytes


class ProgramError(Error):
    """A program breaks a rule that both interpreters rely on."""

    exit_status = 1


class DeadlockError(ProgramError):
    """The instructions wait for each other in a circle."""

    def __init__(self, message: str, cycle: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.cycle = cycle


class RankError(Error):
    """A process of the run died, hung or raised."""

    exit_status = 1

    def __init__(self, message: str, rank: int = -1, detail: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.detail = detail

"""Starting the processes of a run, and watching them from outside `torch.distributed`.

The supervisor is the parent process. It learns of a death from the operating system, not from a
network that may stay silent for half an hour; it names the rank and the instruction from a few
bytes of shared memory that each rank keeps up to date; it ends every process before it raises. ::

    supervisor ──starts once──▶ server ──fork──▶ rank 0, rank 1, ...
         ▲───── say, result, error ──────────────────┘

The server is Python's fork server: it has imported what every rank needs, which takes some seconds,
and does nothing else; so ranks start at once, in this run and in all later ones of the supervisor.
It ends when the supervisor does, and a rank whose server dies is killed by the kernel: nothing is
left behind. Ranks talk to each other over gloo, on the loopback interface only.

It knows nothing of models or plans.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adaptis.errors import Error, InputError, RankError
from adaptis.execute.watch import POLL, Account, Watch, blank_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.process import BaseProcess

_SYMPTOMS = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "gloo",
)
IMPORTED = ["adaptis.execute.server"]  # by the server
NO_GUARD = 87  # how a child says that its import of the script started a run of its own
SETTLE = 0.5  # seconds in which the cause of a lost connection must show


@dataclass(slots=True)
class _Rank:
    process: BaseProcess
    connection: Connection
    account: Account = field(default_factory=Account)
    error: dict[str, Any] | None = None
    result: Any = None
    done: bool = False


def launch(
    target: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    threads: int = 1,
    say: Callable[[str, dict[str, Any]], None] = lambda kind, data: None,
    device: str = "cpu",
) -> list[Any]:
    """Run `target(seat, *args)` in `num_ranks` new processes and return their results.

    Args:
        target: a function that a new process can import; gets a `Seat`.
        num_ranks: how many processes.
        args: pickled for each process.
        threads: of each process's arithmetic.
        say: called with what rank 0 says.
        device: "cpu", or "cuda": the ranks share out the machine's GPUs.

    Raises:
        InputError: the script that called this starts a run when it is imported.
        RankError: a rank died, raised or hung; every process has ended by then.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(NO_GUARD)  # this is a child that is still importing the user's script
    with tempfile.TemporaryDirectory(prefix="adaptis-") as folder:
        record = Path(folder, "progress")
        record.write_bytes(blank_records(num_ranks))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        cores = tuple(sorted(os.sched_getaffinity(0)))
        ranks: list[_Rank] = []
        try:
            with _environment(threads) as environment:
                for rank in range(num_ranks):
                    here, there = context.Pipe()
                    store = str(Path(folder, "store"))
                    seat = Seat(rank, num_ranks, cores, store, str(record), threads, device)
                    process = context.Process(
                        target=_child, args=(seat, there, environment, target, args), daemon=True
                    )
                    process.start()
                    there.close()
                    ranks.append(_Rank(process, here))
            _attend(ranks, Watch(record, lambda rank: ranks[rank].account), say)
            return [rank.result for rank in ranks]
        finally:
            _end(ranks)


@dataclass(frozen=True, slots=True)
class Seat:
    """What a new process needs to take its place."""

    rank: int
    num_ranks: int
    cores: tuple[int, ...]  # that the run may use
    store: str  # file where the ranks find each other
    record: str  # file of the progress records
    threads: int
    device: str = "cpu"  # what kind the rank computes on

    def own_cores(self) -> tuple[int, ...]:
        """The cores of this rank alone; all of them where there are too few to share out."""
        each = len(self.cores) // self.num_ranks
        if each < self.threads:
            return self.cores
        return self.cores[self.rank * each : (self.rank + 1) * each]


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[dict[str, str]]:
    """What the server, and so its children, must find before they import anything.

    Gives the whole environment of now, as the server's may be that of an earlier run.
    """
    changes = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),  # numpy's starts them when it is imported
        "NUMBA_NUM_THREADS": os.environ.get("NUMBA_NUM_THREADS", str(os.cpu_count() or 1)),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "HF_HUB_OFFLINE": "1",
        # Large activations come and go each micro-batch: keep their pages instead of asking the
        # kernel anew.
        "MALLOC_MMAP_THRESHOLD_": "2000000000",
        "MALLOC_TRIM_THRESHOLD_": "-1",
    }
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield dict(os.environ)
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _child(
    seat: Seat,
    connection: Connection,
    environment: dict[str, str],
    target: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """A rank's process, from start to end."""
    # PR_SET_PDEATHSIG: no rank outlives the server, which does not outlive the supervisor.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    _let_the_server_go()
    supervisor = multiprocessing.parent_process()
    if supervisor is None or not supervisor.is_alive():
        os._exit(1)
    os.environ.clear()
    os.environ.update(environment)
    # On cores of its own, a rank that waits for a lock of its network thread makes room for it.
    os.sched_setaffinity(0, seat.own_cores())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c is the supervisor's business
    try:
        connection.send(("result", target(seat, connection, *args)))
        connection.close()
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(("error", describe_error(error)))
        os._exit(1)


def _let_the_server_go() -> None:
    """Close what a rank would start processes of its own with: while it is open the server stays.

    The server waits for the end of a pipe, whose other end Python gives to the ranks as well.
    """
    descriptor = getattr(forkserver._forkserver, "_forkserver_alive_fd", None)
    if descriptor is not None:
        os.close(descriptor)


def describe_error(error: BaseException) -> dict[str, Any]:
    """An exception as the supervisor needs it."""
    text = str(error).strip() or type(error).__name__
    wanted = isinstance(error, Error)
    symptom = not wanted and any(sign in text.lower() for sign in _SYMPTOMS)
    return {
        "text": text if wanted else f"{type(error).__name__}: {text.splitlines()[0]}",
        "wanted": wanted,
        "status": error.exit_status if isinstance(error, Error) else 1,
        "symptom": symptom,
        "traceback": "".join(traceback.format_exception(error)),
    }


def _attend(ranks: list[_Rank], watch: Watch, say: Callable[[str, dict[str, Any]], None]) -> None:
    """Until every rank is done, or the first failure."""
    looked = time.monotonic()
    while not all(rank.done for rank in ranks):
        connections = [rank.connection for rank in ranks if not rank.done]
        sentinels = [rank.process.sentinel for rank in ranks if not rank.done]
        wait([*connections, *sentinels], timeout=POLL)
        if _hear(ranks, say) or any(rank.error for rank in ranks):
            _fail(ranks, _settle(ranks, say), watch)
        if time.monotonic() - looked >= POLL:
            looked = time.monotonic()
            if fault := watch.look():
                raise RankError(fault.text, fault.rank)


def _hear(ranks: list[_Rank], say: Callable[[str, dict[str, Any]], None]) -> list[int]:
    """Listen to all; returns the ranks whose process has ended without a result or an error."""
    ended = [n for n, rank in enumerate(ranks) if rank.process.exitcode is not None]
    for number, rank in enumerate(ranks):
        _listen(number, rank, say)
    return [n for n in ended if not ranks[n].done and not ranks[n].error]


def _listen(number: int, rank: _Rank, say: Callable[[str, dict[str, Any]], None]) -> None:
    """Take in everything that a rank has said."""
    with contextlib.suppress(EOFError, OSError):
        while not rank.done and rank.connection.poll():
            match rank.connection.recv():
                case ("result", value):
                    rank.result, rank.done = value, True
                case ("error", error):
                    rank.error = error
                case ("say", str() as kind, dict() as data):
                    if number == 0:
                        say(kind, data)
                case message:
                    rank.account.take(message)


def _settle(ranks: list[_Rank], say: Callable[[str, dict[str, Any]], None]) -> list[int]:
    """Until a first cause is known, as a lost connection is heard of before what broke it.

    Returns the ranks that vanished.
    """
    deadline = time.monotonic() + SETTLE
    while True:
        vanished = _hear(ranks, say)
        raised = any(rank.error and not rank.error["symptom"] for rank in ranks)
        if vanished or raised or time.monotonic() >= deadline:
            return vanished
        time.sleep(0.01)


def _fail(ranks: list[_Rank], vanished: list[int], watch: Watch) -> NoReturn:
    """Name the first cause.

    A process that vanished, before one that raised, before one that lost its peer.
    """
    for number in vanished:
        _vanished(number, ranks[number], watch.place(number))
    failed = [
        (rank.error["symptom"], number, rank.error)
        for number, rank in enumerate(ranks)
        if rank.error
    ]
    _, number, error = min(failed, key=lambda item: item[:2])
    text = error["text"]
    if not error["wanted"] or error["status"] == 1:
        text = f"rank {number} failed ({watch.place(number)}): {text}"
    failure = RankError(text, number, error["traceback"])
    failure.exit_status = error["status"]
    raise failure


def _vanished(number: int, rank: _Rank, place: str) -> NoReturn:
    """A process ended without a word."""
    code = rank.process.exitcode or 0
    if code == NO_GUARD:
        raise InputError(
            "each process imports this script, which starts a run again: call adaptis.train "
            'below `if __name__ == "__main__":`'
        )
    if code >= 0:
        text = f"rank {number} ended with status {code} before its work was done ({place})"
        raise RankError(text, number)
    hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
    name = signal.Signals(-code).name
    raise RankError(f"rank {number} was killed by {name} ({place}){hint}", number)


def _end(ranks: list[_Rank]) -> None:
    """No process of the run is left when this returns."""
    for rank in ranks:
        if not rank.done and rank.process.is_alive():
            rank.process.kill()
    for rank in ranks:
        rank.process.join(timeout=5.0)
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
        rank.connection.close()

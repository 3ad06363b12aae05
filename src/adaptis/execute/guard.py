"""A rank that somebody else started: it watches its peers, and leaves word of what went wrong.

Under `torchrun` no process of ours stands outside. Each rank has a thread instead that looks at the
records and processes of the ranks of its machine (see `watch`) and reads one key of the store: the
first cause of a failure, which whoever finds it writes there for all machines. gloo may be silent
for as long as it likes; the thread ends the process. ::

    main thread ── computes, waits in gloo
    guard thread ── a peer died, stopped or hangs │ a cause is in the store │ SIGTERM came
                        └──▶ error file, one sentence on stderr, the process ends
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from adaptis.errors import Error, RankError
from adaptis.execute.launch import describe_error
from adaptis.execute.watch import POLL, Account, ProgressRecord, Watch, blank_records, this_machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import Store

_CAUSE = "adaptis/cause"
GRACE = 2.0  # seconds in which the cause of a lost connection must show


class Guard:
    """The watcher inside one rank.

    Args:
        store: of the process group.
        rank: this rank.
        size: how many ranks there are.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank = store, rank
        # The main thread may block its connection, so the thread has another.
        self._own = store.clone()  # pyrefly: ignore[missing-attribute]
        self._path = self._meet(size)
        self.record = ProgressRecord(self._path, rank)
        self._watch = Watch(self._path, self._account)
        self._programs: dict[str, list[Any]] = {}
        self._wake, self._signals = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="adaptis guard", daemon=True)
        self._culprit = 0  # a process that does not end by itself

    def _meet(self, size: int) -> Path:
        """The file of the records, which all ranks of this machine share."""
        key = f"adaptis/records/{this_machine()}"
        if self._store.add(f"{key}/count", 1) == 1:
            with tempfile.NamedTemporaryFile(prefix="adaptis-", delete=False) as file:
                file.write(blank_records(size))
            self._store.set(key, file.name)
        return Path(self._store.get(key).decode())

    def forget_file(self) -> None:
        """Every rank has the records open: nothing needs to be cleaned up later."""
        self._path.unlink(missing_ok=True)

    def tell(self, *message: Any) -> None:
        """Let the peers know what this rank does; see `Account`."""
        match message:
            case ("phase", text):
                self._store.set(f"adaptis/phase/{self._rank}", text)
            case ("program", key, *_):
                self._store.set(f"adaptis/program/{self._rank}/{key}", json.dumps(message))

    def _account(self, rank: int) -> Account:
        """What a rank has told of itself, as far as the store still answers."""
        account = Account()
        with contextlib.suppress(RuntimeError):
            if self._own.check([key := f"adaptis/phase/{rank}"]):
                account.phase = self._own.get(key).decode()
            key = f"adaptis/program/{rank}/{self._watch.spots()[rank].program}"
            if key not in self._programs and self._own.check([key]):
                self._programs[key] = json.loads(self._own.get(key))
            account.take(tuple(self._programs.get(key, ())))
        return account

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The peers are watched, and this rank's own failure is told to all.

        Raises:
            Error: what went wrong, with rank and place.
        """
        with self._wake, self._signals, self._signal_heard():
            self._thread.start()
            try:
                yield
                self.record.depart()
            except Exception as error:
                raise self._failed(error) from error
            finally:
                self._stop()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._wake.send(b"\0")
            self._thread.join()

    @contextlib.contextmanager
    def _signal_heard(self) -> Iterator[None]:
        """SIGTERM reaches the thread, even while the main thread waits inside gloo."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._wake.setblocking(False)
        handler = signal.signal(signal.SIGTERM, lambda *_: None)
        wake = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wake)
            signal.signal(signal.SIGTERM, handler)

    def _failed(self, error: Exception) -> Exception:
        """What this rank raises instead of `error`; the cause is in the store by then."""
        found = describe_error(error)
        if found["symptom"]:
            time.sleep(GRACE)  # the thread finds the cause and ends the process
        self._stop()
        text = found["text"]
        if not found["wanted"] or found["status"] == 1:
            text = f"rank {self._rank} failed ({self._watch.place(self._rank)}): {text}"
        self._cause(text)
        failure = RankError(text, self._rank, found["traceback"])
        failure.exit_status = found["status"]
        _leave_in_file(failure)
        return error if isinstance(error, Error) and text == str(error) else failure

    def _cause(self, text: str) -> str:
        """The first cause that any rank has found; this one if it is the first."""
        with contextlib.suppress(RuntimeError):
            return self._own.compare_set(_CAUSE, "", text).decode()
        return text

    def _run(self) -> None:
        """The thread: until the rank departs or somebody is at fault."""
        while True:
            heard, _, _ = select.select([self._signals], [], [], POLL)
            received = self._signals.recv(64) if heard else b""
            if b"\0" in received:
                return
            ending = signal.SIGTERM in received
            if ending:
                time.sleep(POLL)  # whoever made torchrun end us may not be gone yet
            cause = self._find()
            if cause or ending:
                self._end(cause or "torchrun ended the run by SIGTERM", ending)

    def _find(self) -> str:
        """The cause of a failure, if there is one."""
        if fault := self._watch.ended():
            return self._cause(fault.text)
        with contextlib.suppress(RuntimeError):
            if self._own.check([_CAUSE]):
                return self._own.get(_CAUSE).decode()
        if fault := self._watch.look():
            self._culprit = self._watch.spots()[fault.rank].process
            return self._cause(fault.text)
        return ""

    def _end(self, cause: str, ending: bool) -> None:
        """Say it, leave it in the error file, and end this process."""
        place = self._watch.place(self._rank)
        failure = RankError(f"{cause}; rank {self._rank} was at: {place}", self._rank)
        _leave_in_file(failure)
        sys.stderr.write(f"adaptis: {failure}\n")
        sys.stderr.flush()
        if self._culprit not in (0, os.getpid()):
            time.sleep(2 * POLL)  # it may still be able to speak for itself
            with contextlib.suppress(OSError):
                os.kill(self._culprit, signal.SIGKILL)
        os._exit(128 + signal.SIGTERM if ending else 1)


def _leave_in_file(failure: RankError) -> None:
    """In the file that torchrun's summary reads, where there is one."""
    with contextlib.suppress(OSError):
        try:
            raise failure
        except RankError:  # the handler takes the traceback of what is being handled
            ErrorHandler().record_exception(failure)

"""Which processes a run has started."""

from pathlib import Path


def ranks_of(supervisor):
    """The processes that were forked for a run of the process `supervisor`, and still run."""
    running = _running()
    servers = [
        process
        for process, (parent, line) in running.items()
        if parent == supervisor and "multiprocessing.forkserver" in line
    ]
    return [process for process, (parent, _) in running.items() if parent in servers]


def helpers_of(supervisor):
    """All that `supervisor` started: server and tracker of multiprocessing, and the ranks."""
    direct = [process for process, (parent, _) in _running().items() if parent == supervisor]
    return direct + ranks_of(supervisor)


def _running():
    """Process -> its parent and its command line; those that have ended are left out."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            letter, parent = status.read_text().rpartition(")")[2].split()[:2]
            line = Path(status.parent, "cmdline").read_text()
        except OSError:
            continue
        if letter != "Z":
            found[int(status.parent.name)] = int(parent), line
    return found

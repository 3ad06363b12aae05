"""Timelines as trace events, which ui.perfetto.dev and chrome://tracing open.

A process is a device (counted on through all timelines), thread 0 its computations, 1 its sends, 2
its receives; memory is a counter; a transfer is also an arrow from the instruction that wrote the
value to the one that reads it. Perfetto cannot show overlapping events of one thread: transfers
that overlap get further threads.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from adaptis.program import BACKWARDS, Compute, Kind, Op
from adaptis.report import palette

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from adaptis.timeline import Span, Timeline, Transfer

COMPUTE, SEND, RECEIVE = 0, 1, 2
LANE = 10  # a second lane of sends is thread 11, of receives thread 12
THREADS = {COMPUTE: "compute", SEND: "send", RECEIVE: "receive"}

Event = dict[str, Any]
Spans = dict[tuple[int, Compute], "Span"]  # all devices have the same passes of a sharded head


def render(timelines: Iterable[Timeline]) -> str:
    """The timelines as one JSON trace; times in microseconds, events in the order of time."""
    heads: list[Event] = []
    events: list[Event] = []
    first = flow = 0
    for timeline in timelines:
        spans = {(d, s.compute): s for d in range(timeline.num_devices) for s in timeline.spans(d)}
        sent, received = _by_device(timeline)
        for device in range(timeline.num_devices):
            body = [*_computes(timeline, device, first), *_memory(timeline, device, first)]
            for thread, mine in ((SEND, sent[device]), (RECEIVE, received[device])):
                body += _transfers(mine, thread, first + device)
            heads += _names(
                timeline, device, first + device, {e["tid"] for e in body if e["ph"] == "X"}
            )
            events += body
        for transfer in timeline.transfers:
            events += _flow(transfer, spans, flow, first)
            flow += 1
        first += timeline.num_devices
    events.sort(key=lambda event: event["ts"])
    trace = {"displayTimeUnit": "ms", "traceEvents": heads + events}
    return json.dumps(trace, separators=(",", ":"), allow_nan=False)


def _names(timeline: Timeline, device: int, process: int, threads: set[int]) -> Iterator[Event]:
    name = f"{timeline.name} ({timeline.source}): device {device}"
    base: Event = {"ph": "M", "pid": process, "tid": 0, "ts": 0}
    yield {**base, "name": "process_name", "args": {"name": name}}
    yield {**base, "name": "process_sort_index", "args": {"sort_index": process}}
    for thread in sorted(threads | {COMPUTE}):
        lane, kind = divmod(thread, LANE)
        text = THREADS[kind] + (f" {lane + 1}" if lane else "")
        yield {**base, "tid": thread, "name": "thread_name", "args": {"name": text}}
        yield {**base, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _slice(name: str, process: int, thread: int, start: float, end: float, **args: Any) -> Event:
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": thread,
        "ts": start,
        "dur": round(max(end - start, 0.0), 3),
        "args": args,
    }


def _computes(timeline: Timeline, device: int, first: int) -> Iterator[Event]:
    clock = 0.0
    for span in sorted(timeline.spans(device), key=lambda s: (s.start, s.end)):
        # Clocks of measured files may overlap by their resolution; the track must not.
        start = max(_microseconds(span.start), clock)
        clock = max(_microseconds(span.end), start)
        op, stage, microbatch = span.compute.op, span.compute.stage, span.compute.microbatch
        args = {"stage": stage, "microbatch": microbatch}
        yield {
            **_slice(str(span.compute), first + device, COMPUTE, start, clock, **args),
            "cat": palette.NAMES[op],
        }


def _memory(timeline: Timeline, device: int, first: int) -> Iterator[Event]:
    if not timeline.memory:
        return
    times, amounts = timeline.memory[device]
    for time, amount in zip(times.tolist(), amounts.tolist(), strict=True):
        yield {
            "ph": "C",
            "name": "memory",
            "pid": first + device,
            "tid": 3,
            "ts": _microseconds(time),
            "args": {"bytes": amount},
        }


def _by_device(timeline: Timeline) -> tuple[list[list[Transfer]], list[list[Transfer]]]:
    """What each device sends and what it receives, in order of start."""
    sent: list[list[Transfer]] = [[] for _ in range(timeline.num_devices)]
    received: list[list[Transfer]] = [[] for _ in range(timeline.num_devices)]
    for transfer in sorted(timeline.transfers, key=lambda t: (t.start, t.end)):
        sent[transfer.source].append(transfer)
        received[transfer.target].append(transfer)
    return sent, received


def _transfers(transfers: list[Transfer], thread: int, process: int) -> Iterator[Event]:
    ends: list[float] = []  # of each lane
    for transfer in transfers:
        start, end = _microseconds(transfer.start), _microseconds(transfer.end)
        lane = next((i for i, busy in enumerate(ends) if busy <= start), len(ends))
        ends[lane : lane + 1] = [end]
        args = {"from": transfer.source, "to": transfer.target}
        name = f"{transfer.stage}{THREADS[thread]} {transfer.kind}{transfer.microbatch}"
        yield _slice(name, process, thread + LANE * lane, start, end, **args)


def _flow(transfer: Transfer, spans: Spans, number: int, first: int) -> Iterator[Event]:
    """An arrow between the computations that write and read the value, where both are there."""
    if transfer.kind is Kind.OUTPUT:
        writers, readers, reader = (Op.FORWARD,), (Op.FORWARD, Op.SCORES), transfer.stage + 1
    elif transfer.kind is Kind.INPUT_GRAD:
        writers, readers, reader = (*BACKWARDS, Op.SCORES_GRADIENT), BACKWARDS, transfer.stage - 1
    else:
        return

    def span(device: int, ops: tuple[Op, ...], stage: int) -> Span | None:
        found = (spans.get((device, Compute(op, stage, transfer.microbatch))) for op in ops)
        return next(filter(None, found), None)

    source = span(transfer.source, writers, transfer.stage)
    target = span(transfer.target, readers, reader)
    if source is None or target is None:
        return
    base = {"name": "transfer", "cat": "transfer", "id": number, "tid": COMPUTE}
    # An arrow binds to the slice around its time: just before the end here, the very start there.
    begin, end = _microseconds(source.start), _microseconds(source.end)
    leave = round(max(begin, end - 0.001), 3)
    yield {**base, "ph": "s", "pid": first + source.device, "ts": leave}
    yield {
        **base,
        "ph": "f",
        "bp": "e",
        "pid": first + target.device,
        "ts": _microseconds(target.start),
    }

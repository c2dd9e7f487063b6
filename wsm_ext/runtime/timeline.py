"""A trace as a picture: the JSON of trace events that ui.perfetto.dev and chrome://tracing open.

One process, a thread for each kind of thing. What overlaps lies in several threads (rows) of one
name, each thing in the lowest that is free; forwards may lie inside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import _engine

_PID = 1
_RESIDENT = "(weights that stay)"  # what the engine loads behind the last unit
# From top to bottom: the kind of record, the name of its threads, whether things may be nested.
_TRACKS = (
    ("pass", "passes", False),
    ("forward", "forwards", True),
    ("device_wait", "the device waits", False),
    ("host_wait", "the host waits", False),
    ("copy", "copies to the device", False),
    ("read", "reads", False),
)
_COUNTERS = (("read", "read GB/s"), ("copy", "copied GB/s"))
_WINDOWS = 500
_LEAST_WINDOW_NS = 1_000_000

Event = dict[str, Any]


@dataclass(frozen=True)
class Names:
    """Of what records name by number: units, and files without their folders."""

    units: Sequence[str]
    files: Sequence[str]

    def unit(self, index: int) -> str:
        return self.units[index] if index < len(self.units) else _RESIDENT


def document(timeline: _engine.Timeline, names: Names, device: str) -> dict[str, Any]:
    """The whole file."""
    records = timeline.records
    events = [_named("process_name", 0, name=f"wsm_ext on {device}")]
    thread = 0
    for kind, track, nested in _TRACKS:
        track_records = [record for record in records if record.kind == kind]
        rows = rows_of([(record.begin_ns, record.end_ns) for record in track_records], nested)
        for row in range(max(rows, default=0) + 1):
            title = track if row == 0 else f"{track} {row + 1}"
            events.append(_named("thread_name", thread + row, name=title))
            events.append(_named("thread_sort_index", thread + row, sort_index=thread + row))
        for index, (record, row) in enumerate(zip(track_records, rows, strict=True)):
            event = _event(record, names, f"pass {index + 1}")
            events.append({"pid": _PID, "tid": thread + row, **event})
        thread += max(rows, default=0) + 1
    for kind, title in _COUNTERS:
        events += _counter(title, [record for record in records if record.kind == kind], timeline)
    if timeline.dropped:
        text = f"full: {timeline.dropped} events after this are missing"
        events.append({"ph": "i", "s": "g", "name": text, **_at(timeline.full_ns), "pid": _PID})
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "wsm_ext": _engine.__version__,
            "device": device,
            "dropped_events": timeline.dropped,
            "clock_error_us": timeline.clock_error_ns / 1000,
        },
    }


def rows_of(spans: Sequence[tuple[int, int]], nested: bool = False) -> list[int]:
    """For each span, in the order of their begins, the lowest row where it overlaps with none.

    `nested`: or lies inside those that it overlaps with.
    """
    open_ends: list[list[int]] = []  # by row, outermost first
    rows: list[int] = []
    for begin, end in spans:
        for ends in open_ends:
            while ends and ends[-1] <= begin:
                ends.pop()
        free = (not ends or (nested and end <= ends[-1]) for ends in open_ends)
        row = next((row for row, fits in enumerate(free) if fits), len(open_ends))
        if row == len(open_ends):
            open_ends.append([])
        open_ends[row].append(end)
        rows.append(row)
    return rows


def rates(spans: Sequence[tuple[int, int, int]], window_ns: int, length_ns: int) -> list[float]:
    """GB/s in each window; spans are (begin, end, bytes), evenly moved from begin to end."""
    moved = [0.0] * (length_ns // window_ns + 1)
    for begin, end, nbytes in spans:
        first, last = begin // window_ns, end // window_ns
        for index in range(first, last + 1):
            inside = min(end, (index + 1) * window_ns) - max(begin, index * window_ns)
            moved[index] += nbytes if first == last else nbytes * inside / (end - begin)
    return [nbytes / window_ns for nbytes in moved]  # a byte a ns


def _event(record: _engine.TraceRecord, names: Names, pass_name: str) -> Event:
    if record.kind == "pass":
        return _span(record, pass_name)
    unit = names.unit(record.unit or 0)
    if record.kind in ("host_wait", "device_wait"):
        cause = record.cause if record.kind == "host_wait" else "h2d"
        return _span(record, cause, unit=unit)
    if record.kind == "forward":
        return _span(record, unit)
    if record.kind == "copy":
        rate = record.bytes / max(1, record.end_ns - record.begin_ns)
        return _span(record, unit, bytes=record.bytes, **{"GB/s": round(rate, 3)})
    return _span(
        record,
        f"{unit} (failed)" if record.failed else unit,
        unit=unit,
        file=names.files[record.shard],
        offset=record.offset,
        bytes=record.bytes,
        read_bytes=record.read_bytes,
        route=record.route,
        into="cache" if record.cached else "slot",
    )


def _span(record: _engine.TraceRecord, name: str, **arguments: Any) -> Event:
    event = {
        "ph": "X",
        "name": name,
        "cat": record.kind,
        **_at(record.begin_ns),
        "dur": (record.end_ns - record.begin_ns) / 1000,
    }
    return {**event, "args": arguments} if arguments else event


def _counter(
    title: str, records: Sequence[_engine.TraceRecord], timeline: _engine.Timeline
) -> list[Event]:
    window_ns = max(_LEAST_WINDOW_NS, timeline.length_ns // _WINDOWS)
    spans = [(record.begin_ns, record.end_ns, record.bytes) for record in records]
    return [
        {"ph": "C", "pid": _PID, "name": title, **_at(index * window_ns), "args": {"GB/s": rate}}
        for index, rate in enumerate(rates(spans, window_ns, timeline.length_ns))
    ]


def _named(what: str, thread: int, **arguments: Any) -> Event:
    return {"ph": "M", "pid": _PID, "tid": thread, "name": what, "args": arguments}


def _at(ns: int) -> Event:
    return {"ts": ns / 1000}

"""A trace of a streamed module: taken by the engine, written as a timeline (timeline.py)."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

from .. import _engine
from ..atomic_write import write_atomically
from .timeline import Names, document

_LEAST_EVENTS, _MOST_EVENTS = 1 << 15, 1 << 19


def usual_events(chunks: int, units: int) -> int:
    """Room for two passes of which every chunk is read and copied."""
    return min(max(2 * (2 * chunks + 4 * units), _LEAST_EVENTS), _MOST_EVENTS)


class Tracing:
    """Begins with the constructor; `finish` ends it and writes the file. Raises what the engine
    raises, and OSError or ValueError where the file cannot be written."""

    def __init__(
        self,
        engine: _engine.Engine,
        stream: int,
        path: str | os.PathLike[str],
        names: Names,
        device: str,
        most_events: int,
    ) -> None:
        self._engine = engine
        self._path = Path(path).absolute()  # the block may go to another folder
        self._names = names
        self._device = device
        check_target(self._path)
        engine.start_trace(stream, most_events)

    def finish(self) -> None:
        """Waits until the device has come to the end of what was traced."""
        timeline = self._engine.stop_trace()
        content = document(timeline, self._names, self._device)
        write_atomically(self._path, json.dumps(content) + "\n")
        if timeline.dropped:
            warnings.warn(
                f"the trace was full after {timeline.full_ns * 1e-9:.3f} s: {timeline.dropped}"
                " later events are missing; trace less, or give trace() a larger most_events",
                stacklevel=level_of_user(),
            )


def level_of_user() -> int:
    """The `stacklevel`, for the caller of this, of the first frame that is not of this package, nor
    of contextlib: a trace is ended by its block, by close(), or by what calls these."""
    package = __name__.partition(".")[0]
    level, frame = 1, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in (package, "contextlib"):
        if frame.f_back is None:
            break
        level, frame = level + 1, frame.f_back
    return level


def check_target(path: Path) -> None:
    """Before anything takes its time: raises OSError or ValueError where `path` cannot be written.

    What is there is replaced; anything but a file would be lost by that.
    """
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"a trace cannot be written to {path}: {folder} is not a directory")
    if path.exists() and not path.is_file():
        raise ValueError(
            f"a trace cannot be written to {path}: it exists and is not a regular file"
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"a trace cannot be written to {path}: {folder} cannot be written to")

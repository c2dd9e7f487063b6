"""Waiting for what must happen. How long that takes is nobody's to guess: a test waits for a
condition, and a limit only ends what hangs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

LIMIT_S = 500  # below pytest's own limit, which does not say what was waited for


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {LIMIT_S} s"
        time.sleep(0.001)


def is_inside(thread: threading.Thread, file: str) -> bool:
    """Whether the innermost Python frame of the thread is code of a file of that name."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and Path(frame.f_code.co_filename).name == file


def engine_threads() -> list[str]:
    """The names of this process's threads that are an engine's. A thread may still be listed for a
    moment after it was joined."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it has ended meanwhile
            continue
    return [name for name in names if name.startswith("wsm-")]


def wait_for_engines_to_end() -> None:
    wait_until(lambda: not engine_threads(), "the end of all threads of engines")

"""One session at a time: used by many threads, replaced or ended by any of them, at any time.

    open        the first session stands                    open
    replace     a session ends, and another one begins      open; closed if that fails
    close       the session ends, and all is undone         closed, for good

Two things order the threads:

- *The turn* belongs to the thread that is in a pass (csrc/seam/turn.h). `replace` and `close`
  wait for it.
- *The lock* is held by what uses a session from outside of a pass: fetch, stats, plan, the ends of
  a trace; and by what ends a session.

The turn comes first: nobody waits for it with the lock held, since the thread in a pass may ask for
stats. The session changes only under both. So whoever has waited for them looks again whose session
it is. All else reads the session under the lock, and it stays as it is until the lock is let go.

close() has two steps. Whoever comes first does them, and they may be done again:

    the lock                 weights from RAM go back, the engine closes: passes of others fail
    the turn, then the lock  the module gets back all that was its own

So the second of two closers waits for the turn as the first does, and returns when both steps are
done. An interrupt leaves a close() that can be called again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from .session import Session
from .steps import do_all

CLOSED = "the streamed module is closed"


class Lifecycle:
    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock: AbstractContextManager[bool] = threading.RLock()
        self._session: Session | None = None
        self._replacing = False  # by the thread that has the lock
        self._closing = False  # for good

    def lock(self) -> AbstractContextManager[bool]:
        """Entered by `with`, where no interrupt comes between it and the block."""
        if os.getpid() != self._process:  # a forked child has not the thread that may hold it
            self._process, self._lock = os.getpid(), threading.RLock()
            self._replacing = False
        return self._lock

    @property
    def session(self) -> Session | None:
        """From when everything stands until everything is undone."""
        return self._session

    @property
    def closed(self) -> bool:
        """From the first step of closing on."""
        return self._session is None or self._closing

    @property
    def in_use(self) -> bool:
        """Whether `use` gives a session. For who has the lock."""
        return not (self.closed or self._replacing)

    def now(self) -> Session:
        """The session of this moment. Raises RuntimeError if there is none."""
        session = self._session
        if session is None or self._closing:
            raise RuntimeError(CLOSED)
        return session

    def use(self) -> Session:
        """The session, which stays: for who has the lock."""
        if self._replacing:
            raise RuntimeError("the streamed module is being resized by this thread")
        return self.now()

    def open(self, session: Session) -> None:
        """The first session, or the one after; for who replaces it."""
        self._session = session

    def replace(self, change: Callable[[Session], None]) -> None:
        """Call `change` with the session, between passes: it may open another one."""
        if self.now().inside_pass():
            raise RuntimeError("resize() is for between passes, not inside a forward")
        while True:
            session = self.now()
            with session.between_passes(), self.lock():
                if self.use() is not session:
                    continue
                self._replacing = True
                try:
                    change(session)
                finally:
                    self._replacing = False
                return

    def check_close(self) -> None:
        """Raises RuntimeError in the middle of a pass or a resize of the calling thread."""
        session = self._session
        if session is not None and not session.engine.closed and session.inside_pass():
            raise RuntimeError(
                "close() is for between passes, not inside a forward: let it return, or raise out"
                " of it, first"
            )
        with self.lock():
            if self._replacing:
                raise RuntimeError("close() is not for inside a resize(): let that end first")

    def close(self, shut: Callable[[Session], None], undo: Callable[[Session], None]) -> None:
        """The two steps. `shut` closes the engine, `undo` is called with the turn and the lock."""
        while (session := self._session) is not None:
            self._close(session, shut, undo)

    def _close(
        self, session: Session, shut: Callable[[Session], None], undo: Callable[[Session], None]
    ) -> None:
        def first() -> None:
            with self.lock():
                if self._session is session:
                    self._closing = True
                    if not session.engine.closed:
                        shut(session)

        def second() -> None:
            with session.between_passes(), self.lock():
                if self._session is session:
                    self.end(session, undo)

        do_all(first, second)

    def end(self, session: Session, undo: Callable[[Session], None]) -> None:
        """The second step alone, for who has the turn and the lock."""
        try:
            undo(session)
        finally:
            self._session = None

"""The handle of a streamed module: what is asked of the stream, from any thread at any time."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from torch import nn

from .. import _engine
from ..config import Config
from ..modules.placeholder import StreamedParameter
from ..planning.plan import PlanSummary
from ..planning.planner import Budgets, HeldBytes, ModulePlan
from ..planning.workload import WorkloadSize
from ..sizes import format_bytes, parse_bytes
from .buffers import Buffers
from .claims import claim, release
from .closed import allow_forward, on_meta, refuse_forward
from .figures import Figures
from .guards import Guards
from .lifecycle import CLOSED, Lifecycle
from .replanner import Replanner
from .request import CheckpointLike, StreamRequest
from .seam import out_of_memory
from .session import Progress, Session
from .steps import do_all
from .streamed_class import KEY, StreamedModule, class_on_top, enter_class, leave_class
from .timeline import Names
from .trace import Tracing, level_of_user, usual_events
from .trial import Workload


class StreamHandle:
    """Open from the constructor on, until `close`. If that fails, the module is as it was."""

    def __init__(
        self,
        module: nn.Module,
        checkpoint: CheckpointLike | None,
        device: str | torch.device | None,
        device_memory: int | str,
        host_memory: int | str,
        units: str | Sequence[str],
        workload: Workload | None,
        config: Config | Mapping[str, Any] | None,
        progress: Progress | None,
        preload: _engine.Preload | None = None,
    ) -> None:
        """`preload`: what is read of the checkpoint meanwhile."""
        if hasattr(module, "_orig_mod"):
            raise ValueError(
                "the module was made by torch.compile, which renames its weights: stream the module"
                " itself, and compile it, or its layers, afterwards"
            )
        self._module = module
        self._life = Lifecycle()
        self._tracing: Tracing | None = None
        self._base: frozenset[int] = frozenset()  # ids of the weights that are on the device
        self._asked: tuple[int | str, int | str] = (device_memory, host_memory)
        self._moved_buffers: Buffers | None = None
        self._guards: Guards | None = None
        self._on_meta: list[nn.Module] = []
        claim(self)
        try:
            self._request = StreamRequest.of(module, checkpoint, device, config)
            self._figures = Figures(self._request.checker)
            self._planner = Replanner(self._request, units, workload)
            self._open(workload, progress, preload)
        except BaseException:
            self._give_up()
            raise

    def _open(
        self,
        workload: Workload | None,
        progress: Progress | None,
        preload: _engine.Preload | None,
    ) -> None:
        request, module = self._request, self._module
        meta = on_meta(module)
        self._planner.check_buffers(self._asked[0])
        self._moved_buffers = Buffers(module, request.checkpoint, request.device, request.checker)
        if workload is not None:
            self._planner.try_out(workload)
        held = HeldBytes(host=0 if preload is None else preload.held_bytes)
        budgets = self._planner.budgets(*self._asked, held)
        planned = self._planner.plan(budgets, preload=preload)
        self._start(planned, budgets, progress, preload=preload)
        self._attach()
        self._on_meta = meta
        for inner in module.modules():
            allow_forward(inner)

    def _attach(self) -> None:
        self._guards = Guards(self)
        self._module.__dict__[KEY] = self
        if not enter_class(self._module):
            self._plan.warnings.append(
                f"the class of this {type(self._module).__name__} cannot be changed: use"
                " wsm_ext.handle(module) for plan, stats(), close() and the rest"
            )
        self._warn()

    def _give_up(self) -> None:
        if self._life.session is not None:
            self.close()
        else:
            do_all(self._restore_buffers, lambda: release(self))

    def _start(
        self,
        planned: ModulePlan,
        budgets: Budgets,
        progress: Progress | None,
        before: Session | None = None,
        preload: _engine.Preload | None = None,
    ) -> None:
        planned, memory = self._planner.allocate(planned, budgets, before)
        self._budgets, self._plan = budgets, self._planner.show(planned, budgets)
        session = Session(
            self._request, planned, memory, self._planner.read_method, progress, before, preload
        )
        self._base = frozenset(map(id, session.swapper.placed_parameters()))
        self._life.open(session)

    def _warn(self) -> None:
        for text in self._plan.warnings:
            warnings.warn(text, stacklevel=level_of_user())

    # -- other budgets -----------------------------------------------------------------------------

    def resize(
        self,
        *,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Plan again with other budgets, between passes; one that is None stays as it is.

        What stays on the device or in host memory is not loaded again. (Where the weights came from
        the module itself, they are all put back first, and moved again.) Addresses of parameters
        change. Waits for another thread's pass.

        Raises ValueError where a budget is too small, and then nothing has changed; RuntimeError in
        the middle of a forward.
        """
        wanted = (device_memory, host_memory)
        self._life.replace(lambda session: self._replace(session, wanted, progress))
        self._warn()

    def shrink(self, nbytes: int | str) -> None:
        """Give `nbytes` (or "1GiB") of device memory back, between passes: fewer weights stay.

        Raises ValueError where what is left would be too small.
        """
        wanted = parse_bytes(nbytes, "nbytes")

        def replace(session: Session) -> None:
            taken = session.planned.plan.device_bytes
            beside = (self._planner.activation_bytes or 0) + self._planner.buffer_bytes
            left = taken + beside - wanted
            if left <= 0:
                raise ValueError(
                    f"shrink({nbytes!r}): the weights take {format_bytes(taken)} in all"
                )
            self._replace(session, (left, None), None)

        self._life.replace(replace)
        self._warn()

    def _replace(
        self,
        session: Session,
        wanted: tuple[int | str | None, int | str | None],
        progress: Progress | None,
    ) -> None:
        """With the turn and the lock. What is None stays as it is."""
        if self._tracing is not None:
            raise RuntimeError("resize() is not for inside a trace: end the trace first")
        asked = (
            self._asked[0] if wanted[0] is None else wanted[0],
            self._asked[1] if wanted[1] is None else wanted[1],
        )
        budgets = self._planner.budgets(*asked, session.memory_held())
        planned = self._planner.plan(budgets, session)  # may refuse
        self._figures.take(session, self._plan, self._planner)  # should what follows fail
        self._figures.carry(session)
        try:
            self._restart(session, planned, budgets, progress)
        except BaseException:
            self._life.end(session, self._undo)
            raise
        self._asked = asked

    def _restart(
        self, before: Session, planned: ModulePlan, budgets: Budgets, progress: Progress | None
    ) -> None:
        before.restore_ram_parameters()
        before.stop()
        if before.in_ram:  # nothing is taken over, and the module's parameters are others now
            before.memory.clear(self._request.device)
            self._planner.forget()
            planned = self._planner.plan(budgets, before)
        self._start(planned, budgets, progress, before)

    # -- the surface -------------------------------------------------------------------------------

    @property
    def module(self) -> StreamedModule:
        """The module that streams."""
        return self._module  # type: ignore[return-value]

    @property
    def where(self) -> str:
        """Where the weights are, for messages."""
        checkpoint = self._request.checkpoint
        if checkpoint is None:
            return "the memory of the stream (they came from the module itself)"
        if checkpoint.source is not None:
            return str(checkpoint.source)
        first, *more = checkpoint.shards
        return f"{first} and {len(more)} more files" if more else str(first)

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter is one of the streamed base."""
        return isinstance(parameter, StreamedParameter) or id(parameter) in self._base

    @property
    def session(self) -> Session | None:
        """What runs now; None when it is closed. A resize puts another one there."""
        return self._life.session

    @property
    def closed(self) -> bool:
        """Whether it is closed, or another thread is closing it."""
        return self._life.closed

    @property
    def plan(self) -> PlanSummary:
        """Where every byte lives, what a pass should take, and what the passes until now took."""
        with self._life.lock():
            if self._life.in_use:
                self._plan.update(self._life.use().engine.steady_passes())
            return self._plan

    def expect(self, sequences: int, tokens: int) -> None:
        """Predict the passes of forwards of this size in `plan.predicted`; nothing else changes.

        Computing is measured for it, on the device, beside what streams (transformers models only).
        No effect where nothing was measured at the start.
        """
        with self._life.lock():
            planned = self._life.use().planned
            if self._plan.predicted is None:
                return
            self._planner.expect(WorkloadSize(sequences, tokens))
            self._plan.predicted = self._planner.predict(planned, self._budgets)

    def stats(self) -> dict[str, Any]:
        """Counters as a plain dict: bytes per link, waits by cause, memory.

        `last_pass` waits until the device has ended it. Byte counts are payload, but for
        `disk_read_bytes`, which includes alignment. `stall_seconds` says how long the forward
        waited: `disk` and `arena` on the host, `h2d` on the device. After `close()` they are the
        last ones.
        """
        with self._life.lock():
            if not self._life.in_use:
                return dict(self._figures.last)
            return self._figures.take(self._life.use(), self._plan, self._planner)

    @contextmanager
    def trace(
        self, path: str | os.PathLike[str], *, most_events: int | None = None
    ) -> Iterator[None]:
        """Write a timeline of what happens in the `with` block to `path`, for ui.perfetto.dev.

        It shows each read, what was copied to the device, forwards, waits and passes. The end of
        the block waits for the device. Events beyond the first `most_events` are counted, not kept;
        unless given, there is room for two passes, or for half a million.

        Raises RuntimeError where the module is closed, or traced already; OSError or ValueError
        where the file cannot be written.
        """
        with self._life.lock():
            tracing = self._tracing = self._begin_trace(self._life.use(), path, most_events)
        try:
            yield
        except BaseException:
            with suppress(Exception):  # what the block raised is what matters
                self._end_trace(tracing)
            raise
        self._end_trace(tracing)

    def _begin_trace(
        self, session: Session, path: str | os.PathLike[str], most_events: int | None
    ) -> Tracing:
        if self._tracing is not None:
            raise RuntimeError("a trace of this streamed module is being taken: end it first")
        if not self._plan.streams:
            warnings.warn(
                "all weights stay on the device: a trace has nothing to show",
                stacklevel=level_of_user(),
            )
        names = Names(
            [unit.name for unit in self._plan.units],
            [os.path.basename(shard.path) for shard in session.planned.source.shards],
        )
        stream, device = session.current_stream(), str(self._request.device)
        if most_events is None:
            most_events = usual_events(session.planned.plan.chunk_count, len(self._plan.units))
        return Tracing(session.engine, stream, path, names, device, most_events)

    def _end_trace(self, tracing: Tracing | None) -> None:
        with self._life.lock():
            if tracing is not None and self._tracing is tracing:  # close() may have ended it
                self._tracing = None
                tracing.finish()

    def fetch(self, name: str) -> torch.Tensor:
        """A copy on the device of the parameter `name`.

        Raises KeyError where there is no such parameter.
        """
        with self._life.lock():
            return self._life.use().swapper.fetch(name)

    def refuse_copy(self) -> NoReturn:
        assert self._guards is not None
        self._guards.refuse_copy()

    def watch(self, call: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """A call of the module. Its errors say what the stream has to do with them."""
        try:
            result = call(self._module, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            if self._plan.streams:  # then the wrapped forwards have said it
                raise
            raise out_of_memory(error) from error
        except (RuntimeError, NotImplementedError) as error:
            if not self._life.closed or isinstance(error, _engine.EngineError):
                raise
            raise RuntimeError(f"{CLOSED}: it was closed during this forward") from error
        if self._life.closed:  # what was computed since may be meta tensors
            raise RuntimeError(f"{CLOSED}: it was closed during this forward")
        return result

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for what is under way, restore the module, and free all memory. Idempotent.

        A forward that another thread is in fails. If the module's parameters were on meta before
        `stream()`, they are so again, and its forward says so. `stats()` and `plan` go on to tell
        the last figures.

        Raises RuntimeError in the middle of a forward or a resize of the calling thread, and if
        somebody has changed the module's class meanwhile.
        """
        if self._life.session is None:
            return
        self._life.check_close()
        other = class_on_top(self._module)
        if other is not None:
            raise RuntimeError(
                f"the class of the streamed module has been changed to {other.__module__}."
                f"{other.__qualname__}: undo that first (remove_parametrizations, say), so that"
                " close() can give the module its own class back"
            )
        self._close()

    def _close(self) -> None:
        self._life.close(self._shut, self._undo)

    def _shut(self, session: Session) -> None:
        """The first step of closing: with the lock."""
        do_all(
            lambda: self._end_trace(self._tracing),
            session.restore_ram_parameters,  # they may be nowhere else
            lambda: self._figures.take(session, self._plan, self._planner),
            session.engine.close,
        )

    def _undo(self, session: Session) -> None:
        """The second step: with the turn and the lock. All of it is done, whatever fails."""
        do_all(
            self._refuse_forwards,
            session.restore_ram_parameters,  # if an interrupt has kept the first step from it
            session.stop,
            self._restore_buffers,
            lambda: None if self._guards is None else self._guards.remove(),
            lambda: leave_class(self._module),
            lambda: self._module.__dict__.pop(KEY, None),
            lambda: release(self),
        )

    def _refuse_forwards(self) -> None:
        for inner in self._on_meta:
            refuse_forward(inner, self.where)

    def _restore_buffers(self) -> None:
        if self._moved_buffers is not None:
            self._moved_buffers.restore()

    def __enter__(self) -> StreamedModule:
        return self.module

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        life = self.__dict__.get("_life")
        # At the end of the process the engine was closed before, and nobody needs the rest.
        if life is not None and life.session is not None and not sys.is_finalizing():
            self._close()

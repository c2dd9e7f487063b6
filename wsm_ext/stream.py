"""`stream()` and what it returns: a module whose weights stream to the device while it computes."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from torch import nn

from . import _engine
from .config import Config
from .planning.plan import PlanSummary
from .planning.planner import Budgets, HeldBytes, ModulePlan
from .planning.workload import WorkloadSize
from .runtime.buffers import Buffers
from .runtime.integrity import Counts
from .runtime.replanner import Replanner
from .runtime.request import CheckpointLike, StreamRequest
from .runtime.seam import out_of_memory
from .runtime.session import Progress, Session
from .runtime.timeline import Names
from .runtime.trace import Tracing, usual_events
from .runtime.trial import Workload
from .sizes import format_bytes, parse_bytes


def stream(
    module: nn.Module,
    checkpoint: CheckpointLike | None = None,
    *,
    device: str | torch.device | None = None,
    device_memory: int | str = "auto",
    host_memory: int | str = "auto",
    units: str | Sequence[str] = "auto",
    workload: Workload | None = None,
    verify: bool | str | os.PathLike[str] | None = None,
    config: Config | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> StreamedModule:
    """Make `module` run on `device` with its weights streamed within the budgets given.

    Args:
        module: any module; with a checkpoint its parameters may be on meta.
        checkpoint: a safetensors file, a folder of them (with an index or without), a list of
            files, or an open `Checkpoint`. None: the weights that the module holds in RAM.
        device: "cuda", "cuda:1", or "cpu" (the host device); None: "cuda" where there is one.
        device_memory: bytes, or "12GiB", for weights on the device: what stays there, the arena
            that the rest passes through, and the module's buffers. "auto": what is free, less a
            guard, and less what activations need: as the workload tells, else 15 %.
        host_memory: the same for pinned host memory: the host cache and the staging ring.
        units: what is loaded at once: "auto", "layer", "group" (attention, MLP), "leaf", or the
            names of modules.
        workload: (sequences, tokens of each), or a function that is given the module and runs it as
            it will be run. A trial forward finds what it allocates, and `device_memory` then holds
            that too: activations, outputs and the KV cache.
        verify: check what is loaded, each time, against the hashes that `wsm verify` made of the
            checkpoint. True: those beside it; a path: those in this file; None: as `config` and
            the environment say.
        config: settings beyond these; they win over environment variables.
        progress: called with (bytes done, bytes in all) while weights that stay are loaded.

    Raises:
        CheckpointError (a ValueError): the checkpoint is damaged or does not fit the module.
        ValueError: an argument is wrong, or a budget too small; the message names the least.
        OSError, TimeoutError: the storage failed. EngineError: the device did.
        IntegrityError (an OSError): what was loaded to stay has other bytes than were recorded.
    """
    settings = Config.resolve(config)
    if verify is not None:
        settings.set_argument("verify", verify)
    return StreamedModule(
        module, checkpoint, device, device_memory, host_memory, units, workload, settings, progress
    )


class StreamedModule(nn.Module):
    """A module whose weights stream. Attributes are those of the wrapped module, `.module`.

    Use it like the module, as a context manager, or call `close()` when done: that leaves the
    wrapped module as it was found.
    """

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
        super().__init__()
        if isinstance(module, StreamedModule) or hasattr(module, "_wsm_streamed"):
            raise ValueError("the module is streamed already: close() it first")
        if hasattr(module, "_orig_mod"):
            raise ValueError(
                "the module was made by torch.compile, which renames its weights: stream the module"
                " itself, and compile it, or its layers, afterwards"
            )
        self._session: Session | None = None  # from when everything stands, until it is closed
        self._closing = threading.RLock()
        self._tracing: Tracing | None = None
        self._final_stats: dict[str, Any] = {}
        self._carried_passes = 0  # of the engines before this one
        self._carried: dict[str, Any] = {}
        self.module = module
        self._asked: tuple[int | str, int | str] = (device_memory, host_memory)
        self._request = StreamRequest.of(module, checkpoint, device, config)
        self._planner = Replanner(self._request, units, workload)
        self._planner.check_buffers(device_memory)
        self._moved_buffers = Buffers(
            module, self._request.checkpoint, self._request.device, self._request.checker
        )
        try:
            if workload is not None:
                self._planner.try_out(workload)
            held = HeldBytes(host=0 if preload is None else preload.held_bytes)
            budgets = self._planner.budgets(*self._asked, held)
            planned = self._planner.plan(budgets, preload=preload)
            self._start(planned, budgets, progress, preload=preload)
        except BaseException:
            self._moved_buffers.restore()
            raise
        # The module alone may be handed on, to a pipeline say: it keeps this alive.
        object.__setattr__(module, "_wsm_streamed", self)
        for text in self._plan.warnings:
            warnings.warn(text, stacklevel=3)

    def _start(
        self,
        planned: ModulePlan,
        budgets: Budgets,
        progress: Progress | None,
        before: Session | None = None,
        preload: _engine.Preload | None = None,
    ) -> None:
        planned, memory = self._planner.allocate(planned, budgets, before)
        self._planned, self._budgets = planned.plan, budgets
        self._plan = self._planner.show(planned, budgets)
        self._session = Session(
            self._request, planned, memory, self._planner.read_method, progress, before, preload
        )

    def _now(self) -> Session:
        if self._session is None:
            raise RuntimeError("the streamed module is closed")
        return self._session

    @contextmanager
    def _between_passes(self) -> Iterator[Session]:
        """What runs when no other thread is in a pass any more: that thread may have resized."""
        while True:
            session = self._now()
            with session.swapper.seam.between():
                if session is self._session:
                    yield session
                    return

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
        self._replan(device_memory, host_memory, progress)

    def shrink(self, nbytes: int | str) -> None:
        """Give `nbytes` (or "1GiB") of device memory back, between passes: fewer weights stay.

        Raises ValueError where what is left would be too small.
        """
        wanted = parse_bytes(nbytes, "nbytes")
        taken = self._planned.device_bytes
        beside = (self._planner.activation_bytes or 0) + self._planner.buffer_bytes
        left = taken + beside - wanted
        if left <= 0:
            raise ValueError(f"shrink({nbytes!r}): the weights take {format_bytes(taken)} in all")
        self._replan(left, None, None)

    def _replan(
        self,
        device_memory: int | str | None,
        host_memory: int | str | None,
        progress: Progress | None,
    ) -> None:
        if self._now().swapper.seam.inside:
            raise RuntimeError("resize() is for between passes, not inside a forward")
        if self._tracing is not None:
            raise RuntimeError("resize() is not for inside a trace: end the trace first")
        asked = (
            self._asked[0] if device_memory is None else device_memory,
            self._asked[1] if host_memory is None else host_memory,
        )
        with self._between_passes() as session:
            budgets = self._planner.budgets(*asked, session.memory_held())
            planned = self._planner.plan(budgets, session)  # may refuse
            self._final_stats = self.stats()  # should what follows fail
            self._carried_passes += session.engine.passes
            self._carried = _add(self._carried, session.engine.totals())
            try:
                self._restart(session, planned, budgets, progress)
            except BaseException:
                self._end(session)
                raise
            self._asked = asked
        for text in self._plan.warnings:
            warnings.warn(text, stacklevel=3)

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
    def plan(self) -> PlanSummary:
        """Where every byte lives, what a pass should take, and what the passes until now took."""
        if self._session is not None:
            self._plan.update(self._session.engine.steady_passes())
        return self._plan

    def expect(self, sequences: int, tokens: int) -> None:
        """Predict the passes of forwards of this size in `plan.predicted`; nothing else changes.

        Computing is measured for it, on the device, beside what streams (transformers models only).
        No effect where nothing was measured at the start.
        """
        planned = self._now().planned
        if self._plan.predicted is None:
            return
        self._planner.expect(WorkloadSize(sequences, tokens))
        self._plan.predicted = self._planner.predict(planned, self._budgets)

    def stats(self) -> dict[str, Any]:
        """Counters as a plain dict: bytes per link, waits by cause, memory.

        `last_pass` waits until the device has ended it. Byte counts are payload, but for
        `disk_read_bytes`, which includes alignment. `stall_seconds` says how long the forward
        waited: `disk` and `arena` on the host, `h2d` on the device.
        """
        session = self._session
        if session is None:
            return dict(self._final_stats)
        engine, checker = session.engine, self._request.checker
        self._plan.update(engine.steady_passes())
        memory = engine.memory()
        device_bytes = self._planned.device_bytes
        return {
            "passes": self._carried_passes + engine.passes,
            "memory": {
                "device_bytes": device_bytes,
                "device_peak_bytes": device_bytes,
                "device_budget_bytes": self._plan.device_budget_bytes,
                "buffer_bytes": self._planner.buffer_bytes,
                "host_bytes": memory.host_bytes,
                "host_pinned_bytes": memory.host_pinned_bytes,
                "host_peak_bytes": memory.host_peak_bytes,
                "host_budget_bytes": self._planned.host_budget_bytes,
            },
            "last_pass": engine.last_pass(),
            "totals": _add(self._carried, engine.totals()),
            "readers": engine.readers(),
            "verified": asdict(checker.counts if checker else Counts()),
            "warnings": list(dict.fromkeys(self._plan.warnings + engine.warnings)),
        }

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
        session = self._now()
        if self._tracing is not None:
            raise RuntimeError("a trace of this streamed module is being taken: end it first")
        if not self._plan.streams:
            warnings.warn(
                "all weights stay on the device: a trace has nothing to show", stacklevel=3
            )
        names = Names(
            [unit.name for unit in self._plan.units],
            [os.path.basename(shard.path) for shard in session.planned.source.shards],
        )
        stream, device = session.current_stream(), str(self._request.device)
        if most_events is None:
            most_events = usual_events(self._planned.chunk_count, len(self._plan.units))
        self._tracing = Tracing(session.engine, stream, path, names, device, most_events)
        try:
            yield
        except BaseException:
            with suppress(Exception):  # what the block raised is what matters
                self._end_trace()
            raise
        self._end_trace()

    def _end_trace(self) -> None:
        tracing, self._tracing = self._tracing, None
        if tracing is not None:  # close() may have ended it
            tracing.finish()

    def fetch(self, name: str) -> torch.Tensor:
        """A copy on the device of the parameter `name` (a name of the wrapped module).

        Raises KeyError where there is no such parameter.
        """
        return self._now().swapper.fetch(name)

    def close(self) -> None:
        """Wait for what is under way, restore the module, and free all memory. Idempotent.

        A forward that another thread is in fails. `stats()` goes on to tell the last figures.

        Raises RuntimeError in the middle of a forward of the calling thread.
        """
        session = self._session
        if session is None:
            return
        if not session.engine.closed and session.swapper.seam.inside:
            raise RuntimeError(
                "close() is for between passes, not inside a forward: let it return, or raise out"
                " of it, first"
            )
        with self._closing:  # one of several threads does it
            if self._session is not None:
                self._close(self._session)

    def _close(self, session: Session) -> None:
        try:
            if not session.engine.closed:
                try:
                    self._end_trace()
                finally:  # the module's own weights may be nowhere else
                    session.restore_ram_parameters()
                    self._final_stats = self.stats()
        finally:
            self._end(session)

    def _end(self, session: Session) -> None:
        if self._session is None:  # a signal's handler has closed it
            return
        self._session = None
        session.stop()
        self._moved_buffers.restore()
        object.__delattr__(self.module, "_wsm_streamed")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.module(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            if self._plan.streams:  # then the wrapped forwards have said it
                raise
            raise out_of_memory(error) from error

    def __setattr__(self, name: str, value: Any) -> None:
        # What the wrapped module has is set there: `net.generation_config = ...` means the model's.
        wrapped = self.__dict__.get("_modules", {}).get("module")
        own = wrapped is None or name in self.__dict__ or name.startswith("_")
        if own or not hasattr(wrapped, name):
            super().__setattr__(name, value)
        else:
            setattr(wrapped, name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module" or name.startswith("_"):
                raise
            return getattr(super().__getattr__("module"), name)

    def __enter__(self) -> StreamedModule:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self.__dict__.get("_session") is not None:
            self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        # copy.deepcopy and pickle come here; those of the wrapped module too, which refers to this.
        raise TypeError(
            "a streamed module cannot be copied or pickled: it holds files, threads and memory of a"
            " device. Do it before stream(), or after close(); in another process, stream again"
        )

    # Names are those of the wrapped module.

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return self.module.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self._session is None:
            return self.module.state_dict(*args, **kwargs)
        raise RuntimeError(
            "a streamed module's weights are in its checkpoint; use fetch(name) for one of them, or"
            " close() first"
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self._session is None:
            return self.module.load_state_dict(*args, **kwargs)
        raise RuntimeError(
            "a streamed module's weights are those of its checkpoint: close() it, and stream it"
            " from another one. Adapters are loaded into `module`"
        )


def _add(counts: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Sums of counters, those in nested dicts too."""
    if not counts:
        return more
    return {
        key: _add(counts[key], value) if isinstance(value, dict) else counts[key] + value
        for key, value in more.items()
    }

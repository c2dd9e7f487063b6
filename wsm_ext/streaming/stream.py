"""`stream()` and what it returns: a module whose weights stream to the device while it computes."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from .. import _engine
from ..checkpoints.checkpoint import Checkpoint
from ..config import USUAL_WAY, Config, engine_options
from ..modules import sources
from ..modules.units import Unit
from ..planning.device_memory import DeviceMemory
from ..planning.plan import Plan
from ..planning.planner import Budgets, Planned, Planner, streams
from ..planning.predict import files_of, measuring_matters, predict
from ..planning.rates import Rates, Sizes, gather
from ..sizes import format_bytes, parse_bytes
from .buffers import Buffers
from .integrity import Checker, Counts
from .passes import out_of_memory
from .residency import Residency, stream_getter
from .timeline import Names
from .trace import Tracing, usual_events
from .trial import Usual, Workload, activation_bytes

CheckpointLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Checkpoint
Progress = Callable[[int, int], None]

# A pass may take many reads: so many limits of one read are waited for another thread's.
_PATIENCE = 20
# Of a device budget that could not be had.
_LESS = 0.9
_MOST_TRIES = 12


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
        device_memory: bytes, or "12GiB", for weights on the device: what stays there, and the arena
            that the rest passes through. "auto": what is free, less a guard, and less what
            activations need: as the workload tells, else 15 %.
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
        settings.give("verify", verify)
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
        ahead: _engine.ReadAhead | None = None,
    ) -> None:
        super().__init__()
        if isinstance(module, StreamedModule) or hasattr(module, "_wsm_streamed"):
            raise ValueError("the module is streamed already: close() it first")
        if hasattr(module, "_orig_mod"):
            raise ValueError(
                "the module was made by torch.compile, which renames its weights: stream the module"
                " itself, and compile it, or its layers, afterwards"
            )
        self._closed = True  # until everything stands
        self._final_stats: dict[str, Any] = {}
        self._tracing: Tracing | None = None
        self.module = module
        self._device = resolve_device(device)
        self._config = Config.resolve(config)
        self._asked: tuple[int | str, int | str] = (device_memory, host_memory)
        self._activation_bytes: int | None = None
        self._rates: Rates | None = None  # None: nothing was measured
        # What computing is measured at: sizes that the user stated.
        stated = not (workload is None or callable(workload) or isinstance(workload, Usual))
        self._sizes: Sizes | None = workload if stated else None  # type: ignore[assignment]
        self._made: Planned | None = None
        self._memory: DeviceMemory | None = None
        self._ahead = ahead  # of the first engine: what is read of the checkpoint meanwhile
        self._carried_passes = 0  # of the engines before this one
        self._carried: dict[str, Any] = {}
        opened = _open(checkpoint)
        if opened is not None:
            sources.check_surplus(module, opened)
        self._checker = _checker(opened, self._config)
        self._planner = Planner(module, opened, units, self._config)
        self._planner.check()
        self._moved_buffers = Buffers(module, opened, self._device, self._checker)
        try:
            if workload is not None:
                self._activation_bytes = self._try_out(workload)
            held = (0, 0 if ahead is None else ahead.held_bytes)
            budgets = Budgets(
                self._device, *self._asked, self._config, self._activation_bytes, held
            )
            self._start_with(self._plan_for(budgets), budgets, progress)
        except BaseException:
            self._moved_buffers.restore()
            raise
        for text in self._plan.warnings:
            warnings.warn(text, stacklevel=3)

    def _try_out(self, workload: Workload) -> int | None:
        try:
            least = self._planner.plan_least()
            return activation_bytes(self.module, least, self._device, workload)
        except (ValueError, torch.OutOfMemoryError):
            if not isinstance(workload, Usual):
                raise
            return None

    # -- starting, and starting again with other budgets -------------------------------------------

    def _start_with(
        self,
        planned: Planned,
        budgets: Budgets,
        progress: Progress | None,
        before: _engine.Engine | None = None,
    ) -> None:
        """Starts by the plan; by a smaller one, where the device has less memory than it said."""
        asked = budgets.device_bytes
        for _ in range(_MOST_TRIES):
            try:
                memory = DeviceMemory.allocate(
                    planned.plan, planned.source, self._device, self._memory
                )
                break
            except torch.OutOfMemoryError as error:
                budgets.device_bytes = int(budgets.device_bytes * _LESS)
                kept = None if before is None else before.kept_cache()
                planned = self._plan_within(budgets, kept)
                planned.warnings.append(
                    f"the device has no {format_bytes(asked)} for weights ({_first_line(error)}):"
                    f" planned again with {format_bytes(budgets.device_bytes)}"
                )
        else:
            memory = DeviceMemory.allocate(planned.plan, planned.source, self._device)
        self._memory = memory
        self._set_plan(planned, budgets)
        self._start(progress, before)

    def _plan_for(self, budgets: Budgets, kept: _engine.KeptCache | None = None) -> Planned:
        """The plan; the machine is measured as soon as that can matter, and once."""
        planned = self._plan_within(budgets, kept)
        if self._rates is not None or not measuring_matters(planned.plan, self._config):
            return planned
        if self._ahead is not None:
            self._ahead.stop()  # the disk is measured alone
        files = files_of(planned.source)
        self._rates = gather(self.module, files, self._device, self._config, self._sizes)
        return self._plan_within(budgets, kept)

    def _plan_within(self, budgets: Budgets, kept: _engine.KeptCache | None) -> Planned:
        before = self._made if self._made is not None and streams(self._made.plan) else None
        rates_of = None if self._rates is None else self._rates.for_units
        return self._planner.plan(budgets, rates_of, kept, before)

    def _set_plan(self, planned: Planned, budgets: Budgets) -> None:
        self._made = planned
        self._units, self._source, self._planned = planned.units, planned.source, planned.plan
        predicted = None
        if self._rates is not None and streams(planned.plan):
            predicted = predict(planned, self._planner, budgets, self._rates)
        self._budgets = budgets
        self._plan = Plan(planned.plan, planned.units, planned.source, predicted)
        self._plan.activation_bytes = self._activation_bytes
        self._plan.warnings[:0] = planned.warnings

    def _start(self, progress: Progress | None, before: _engine.Engine | None) -> None:
        planned, device, memory = self._planned, self._device, self._memory
        assert memory is not None
        arena, homes = memory.addresses()
        current_stream = stream_getter(device)
        images = [] if self._checker is None else self._checker.images_of(self._source)
        self._engine = _engine.Engine(
            planned,
            -1 if device.type == "cpu" else device.index,
            arena,
            homes,
            self._source.memory,
            current_stream(),
            engine_options(self._config, self._rates.way if self._rates else USUAL_WAY),
            before,
            self._ahead,
        )
        self._ahead = None
        # Before torch and the driver are torn down, should nobody close it.
        self._finalizer = weakref.finalize(self, self._engine.close)
        try:
            self._engine.load_resident(current_stream(), self._progress_of(progress))
            if progress is not None:
                progress(planned.device_home_bytes, planned.device_home_bytes)
            self._residency = Residency(
                self.module,
                self._units,
                self._source,
                planned,
                self._engine,
                device,
                memory,
                _PATIENCE * self._config.read_timeout_s,
                self._checker,
                images,
            )
            memory.loaded = [True] * len(memory.homes)
            # The module alone may be handed on, to a pipeline say: it keeps this alive.
            object.__setattr__(self.module, "_wsm_streamed", self)
            self._closed = False
            if self._source.in_ram:
                self._move_from_ram(current_stream())
        except BaseException:
            if not self._closed:
                self.close()
            self._engine.close()
            raise

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
        if self._closed:
            raise RuntimeError("the streamed module is closed")
        if self._residency.passes.inside():
            raise RuntimeError("resize() is for between passes, not inside a forward")
        if self._tracing is not None:
            raise RuntimeError("resize() is not for inside a trace: end the trace first")
        asked = (
            self._asked[0] if device_memory is None else device_memory,
            self._asked[1] if host_memory is None else host_memory,
        )
        with self._residency.passes.between():
            held = self._memory_held()
            budgets = Budgets(self._device, *asked, self._config, self._activation_bytes, held)
            planned = self._plan_for(budgets, self._engine.kept_cache())  # may refuse
            self._carry_counters()
            if self._source.in_ram:
                self._restart_from_ram(budgets, progress)
            else:
                self._restart(planned, budgets, progress)
            self._asked = asked
        for text in self._plan.warnings:
            warnings.warn(text, stacklevel=2)

    def shrink(self, nbytes: int | str) -> None:
        """Give `nbytes` (or "1GiB") of device memory back, between passes: fewer weights stay.

        Raises ValueError where what is left would be too small.
        """
        wanted = parse_bytes(nbytes, "nbytes")
        left = self._planned.device_bytes + (self._activation_bytes or 0) - wanted
        if left <= 0:
            raise ValueError(
                f"shrink({nbytes!r}): the weights take {format_bytes(self._planned.device_bytes)}"
                " in all"
            )
        self.resize(device_memory=left)

    def _memory_held(self) -> tuple[int, int]:
        """Device and host bytes that a new plan may use again."""
        return self._planned.device_bytes, self._engine.memory()[0]

    def _restart(self, planned: Planned, budgets: Budgets, progress: Progress | None) -> None:
        before = self._engine
        try:
            self._residency.undo()
            self._finalizer.detach()
            before.close()  # what it loads ahead must not reach memory that is freed now
            self._start_with(planned, budgets, progress, before)
        except BaseException:
            self._abandon(before)
            raise

    def _restart_from_ram(self, budgets: Budgets, progress: Progress | None) -> None:
        before = self._engine
        try:
            self._give_back_owned()
            self._residency.undo()
            before.close()
            self._planner.forget()
            if self._memory is not None:
                self._memory.clear(self._device)
            self._start_with(self._plan_for(budgets), budgets, progress)
        except BaseException:
            self._abandon(before)
            raise

    def _abandon(self, before: _engine.Engine) -> None:
        """A resize failed half-way: close what there is."""
        before.close()
        if not self._closed:
            self.close()

    def _carry_counters(self) -> None:
        self._carried_passes += self._engine.passes
        self._carried = _add(self._carried, self._engine.totals())

    def _progress_of(self, progress: Progress | None) -> Callable[[], None] | None:
        if progress is None:
            return None
        total = self._planned.device_home_bytes
        return lambda: progress(min(self._engine.totals()["h2d_bytes"], total), total)

    # -- weights that the module holds in RAM ------------------------------------------------------

    def _move_from_ram(self, current: int) -> None:
        """Load every unit once, so that what has a home in the host cache is there.

        Each of the module's own tensors is let go as soon as no unit needs it any more.
        """
        needed = self._planned.shards_on_disk()
        last_use: dict[int, list[int]] = {}
        for shard in self._source.owned:
            users = [i for i, unit in enumerate(self._units) if self._uses(unit, shard)]
            last_use.setdefault(max(users), []).append(shard)
        for index, unit in enumerate(self._plan.units):
            if unit.streamed_bytes:
                self._engine.acquire(index, current)
                self._engine.release(index, current)
            for shard in last_use.get(index, []):
                if shard not in needed:
                    self._source.owned[shard].let_go()

    def _uses(self, unit: Unit, shard: int) -> bool:
        # Each shard in RAM is one tensor, of the same index.
        return any(self._source.index_of[slot.name] == shard for slot in unit.slots)

    def _give_back_owned(self) -> None:
        """Every one that can be, even when one cannot."""
        failed: list[str] = []
        for owned in self._source.owned.values():
            try:
                owned.put_back(self._residency.fetch_host)
            except Exception as error:
                failed.append(f"{owned.name}: {error}")
        if failed:
            raise RuntimeError("parameters that could not be put back: " + "; ".join(failed))

    # -- the surface -------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Where every byte lives, what a pass should take, and what the passes until now took."""
        if not self._closed:
            self._plan.update(self._engine.steady_passes())
        return self._plan

    def expect(self, sequences: int, tokens: int) -> None:
        """Predict the passes of forwards of this size in `plan.predicted`; nothing else changes.

        Computing is measured for it, on the device, beside what streams (transformers models only).
        No effect where nothing was measured at the start.
        """
        if self._closed:
            raise RuntimeError("the streamed module is closed")
        if self._rates is None or self._plan.predicted is None:
            return
        self._rates = self._rates.at(self.module, self._device, (sequences, tokens))
        planned = Planned(self._units, self._source, self._planned, "", [])
        self._plan.predicted = predict(planned, self._planner, self._budgets, self._rates)

    def stats(self) -> dict[str, Any]:
        """Counters as a plain dict: bytes per link, waits by cause, memory.

        `last_pass` waits until the device has ended it. Byte counts are payload, but for
        `disk_read_bytes`, which includes alignment. `stall_seconds` says how long the forward
        waited: `disk` and `arena` on the host, `h2d` on the device.
        """
        if self._closed:
            return dict(self._final_stats)
        self._plan.update(self._engine.steady_passes())
        host_bytes, pinned_bytes, host_peak_bytes = self._engine.memory()
        device_bytes = self._planned.device_bytes
        return {
            "passes": self._carried_passes + self._engine.passes,
            "memory": {
                "device_bytes": device_bytes,
                "device_peak_bytes": device_bytes,
                "device_budget_bytes": self._planned.device_budget_bytes,
                "host_bytes": host_bytes,
                "host_pinned_bytes": pinned_bytes,
                "host_peak_bytes": host_peak_bytes,
                "host_budget_bytes": self._planned.host_budget_bytes,
            },
            "last_pass": self._engine.last_pass(),
            "totals": _add(self._carried, self._engine.totals()),
            "readers": self._engine.readers(),
            "verified": asdict(self._checker.counts if self._checker else Counts()),
            "warnings": list(dict.fromkeys(self._plan.warnings + self._engine.warnings)),
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
        if self._closed:
            raise RuntimeError("the streamed module is closed")
        if self._tracing is not None:
            raise RuntimeError("a trace of this streamed module is being taken: end it first")
        if not self._plan.streams:
            warnings.warn(
                "all weights stay on the device: a trace has nothing to show", stacklevel=3
            )
        names = Names(
            [unit.name for unit in self._plan.units],
            [os.path.basename(shard[0]) for shard in self._source.shards],
        )
        stream = stream_getter(self._device)()
        if most_events is None:
            most_events = usual_events(self._planned.chunk_count, len(self._units))
        self._tracing = Tracing(self._engine, stream, path, names, str(self._device), most_events)
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
        if self._closed:
            raise RuntimeError("the streamed module is closed")
        return self._residency.fetch(name)

    def close(self) -> None:
        """Wait for what is under way, restore the module, and free all memory. Idempotent.

        A forward that another thread is in fails. `stats()` goes on to tell the last figures.

        Raises RuntimeError in the middle of a forward of the calling thread.
        """
        if self._closed:
            return
        if not self._engine.closed and self._residency.passes.inside():
            raise RuntimeError(
                "close() is for between passes, not inside a forward: let it return, or raise out"
                " of it, first"
            )
        try:
            if not self._engine.closed:
                try:
                    self._end_trace()
                finally:  # the module's own weights may be nowhere else
                    self._give_back_owned()
                    self._final_stats = self.stats()
        finally:
            self._closed = True
            self._engine.close()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # no forward may read what is freed now
            with self._residency.passes.between():
                self._residency.undo()
                self._moved_buffers.restore()
            object.__delattr__(self.module, "_wsm_streamed")
            self._finalizer.detach()
            del self._engine, self._residency, self._memory

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
        if not self.__dict__.get("_closed", True):
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
        if self._closed:
            return self.module.state_dict(*args, **kwargs)
        raise RuntimeError(
            "a streamed module's weights are in its checkpoint; use fetch(name) for one of them, or"
            " close() first"
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self._closed:
            return self.module.load_state_dict(*args, **kwargs)
        raise RuntimeError(
            "a streamed module's weights are those of its checkpoint: close() it, and stream it"
            " from another one. Adapters are loaded into `module`"
        )


def resolve_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() and _engine.built_with_cuda else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda":
        raise ValueError(f"device {str(device)!r} is not supported: use 'cuda', 'cuda:N' or 'cpu'")
    if not _engine.built_with_cuda:
        raise _engine.EngineError(
            "wsm_ext was built without CUDA: install a CUDA toolkit and reinstall with WSM_CUDA=ON,"
            " or use device='cpu'"
        )
    if not torch.cuda.is_available():
        raise _engine.EngineError(
            "torch sees no CUDA device: check the driver with nvidia-smi and that torch was"
            " installed with CUDA, or use device='cpu'"
        )
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    return torch.device("cuda", index)


def _add(counts: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Sums of counters, those in nested dicts too."""
    if not counts:
        return more
    return {
        key: _add(counts[key], value) if isinstance(value, dict) else counts[key] + value
        for key, value in more.items()
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open(checkpoint: CheckpointLike | None) -> Checkpoint | None:
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return checkpoint
    return Checkpoint.open(checkpoint)


def _checker(checkpoint: Checkpoint | None, config: Config) -> Checker | None:
    """Where settings ask for it."""
    asked = config.verify
    if asked is False:
        return None
    given = config.describe("verify")
    if checkpoint is not None:
        return Checker(checkpoint, None if asked is True else Path(asked).expanduser(), given)
    if config.sources["verify"] == "variable":  # it is meant for others, which have checkpoints
        config.warnings.append(f"{given} has no effect: the weights come from the module itself")
        return None
    raise ValueError(
        f"{given}: the weights come from the module itself, and hashes are those of a checkpoint;"
        " give the checkpoint, or leave verify out"
    )

"""`stream()` and what it returns: a module whose weights stream to the device while it computes."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from . import _engine, sources
from .checkpoint import Checkpoint
from .config import Config
from .plan import Plan
from .planning import Budgets, plan_module
from .residency import Residency, allocate, stream_getter
from .units import Unit

CheckpointLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Checkpoint
Progress = Callable[[int, int], None]

# A pass may take many reads: so many limits of one read are waited for another thread's.
_PATIENCE = 20


def stream(
    module: nn.Module,
    checkpoint: CheckpointLike | None = None,
    *,
    device: str | torch.device | None = None,
    device_memory: int | str = "auto",
    host_memory: int | str = "auto",
    units: str | Sequence[str] = "auto",
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
            that the rest passes through. "auto": what is free, less a guard,
            and less a share for activations.
        host_memory: the same for pinned host memory: the host cache and the staging ring.
        units: what is loaded at once: "auto", "layer", "group" (attention, MLP), "leaf", or the
            names of modules.
        config: settings beyond these; they win over environment variables.
        progress: called with (bytes done, bytes in all) while weights that stay are loaded.

    Raises:
        CheckpointError (a ValueError): the checkpoint is damaged or does not fit the module.
        ValueError: an argument is wrong, or a budget too small; the message names the least.
        OSError, TimeoutError: the storage failed. EngineError: the device did.
    """
    return StreamedModule(
        module, checkpoint, device, device_memory, host_memory, units, config, progress
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
        config: Config | Mapping[str, Any] | None,
        progress: Progress | None,
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
        self.module = module
        self._device = _resolve_device(device)
        self._config = Config.resolve(config)
        budgets = Budgets(self._device, device_memory, host_memory, self._config)
        opened = _open(checkpoint)
        if opened is not None:
            sources.check_surplus(module, opened)
        self._units, self._source, self._planned, warned = plan_module(
            module, opened, units, budgets, self._config
        )
        self._plan = Plan(self._planned, self._units, self._source)
        self._plan.warnings[:0] = warned
        for text in self._plan.warnings:
            warnings.warn(text, stacklevel=3)
        self._replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._start(opened, progress)

    def _start(self, checkpoint: Checkpoint | None, progress: Progress | None) -> None:
        planned, device = self._planned, self._device
        self._arena = allocate(planned.arena_bytes, device)
        self._homes = allocate(planned.homes_bytes, device)
        current_stream = stream_getter(device)
        self._engine = _engine.Engine(
            planned,
            -1 if device.type == "cpu" else device.index,
            self._arena.data_ptr() if planned.arena_bytes else 0,
            self._homes.data_ptr() if planned.homes_bytes else 0,
            self._source.memory,
            current_stream(),
            _engine_options(self._config),
        )
        # Before torch and the driver are torn down, should nobody close it.
        self._finalizer = weakref.finalize(self, self._engine.close)
        try:
            self._engine.load_resident(current_stream(), self._progress_of(progress))
            if progress is not None:
                progress(planned.device_home_bytes, planned.device_home_bytes)
            self._place_buffers(checkpoint)
            self._residency = Residency(
                self.module,
                self._units,
                self._source,
                planned,
                self._engine,
                device,
                self._arena,
                self._homes,
                _PATIENCE * self._config.read_timeout_s,
            )
            # The module alone may be handed on, to a pipeline say: it keeps this alive.
            object.__setattr__(self.module, "_wsm_streamed", self)
            self._closed = False
            if self._source.in_ram:
                self._move_from_ram(current_stream())
        except BaseException:
            if not self._closed:
                self.close()
            self._restore_buffers()
            self._engine.close()
            raise

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

    # -- what does not stream ----------------------------------------------------------------------

    def _replace(self, held: dict[str, Any], key: str, value: torch.Tensor) -> None:
        self._replaced.append((held, key, held[key]))
        held[key] = value

    def _place_buffers(self, checkpoint: Checkpoint | None) -> None:
        """Buffers are small: they live on the device. Persistent ones come from the checkpoint.

        So do parameters without a single element, which no unit has.
        """
        for prefix, owner in self.module.named_modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None and parameter.numel() == 0:
                    empty = torch.empty_like(parameter, device=self._device)
                    self._replace(owner._parameters, key, nn.Parameter(empty, False))
            for key, buffer in owner._buffers.items():
                if buffer is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                value = buffer
                persistent = key not in owner._non_persistent_buffers_set
                if checkpoint is not None and persistent and name in checkpoint.tensors:
                    value = sources.read_tensor(checkpoint, name)
                    if value.shape != buffer.shape:
                        raise ValueError(
                            f"buffer {name!r} has shape {list(buffer.shape)}, the checkpoint's has"
                            f" {list(value.shape)}"
                        )
                    value = value.to(buffer.dtype)
                elif buffer.is_meta:
                    raise ValueError(
                        f"buffer {name!r} is on meta and the checkpoint does not have it: build the"
                        " module with its buffers real (only parameters on meta)"
                    )
                self._replace(owner._buffers, key, value.to(self._device))

    def _restore_buffers(self) -> None:
        for held, key, found in self._replaced:
            held[key] = found
        self._replaced.clear()

    # -- the surface -------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """Where every byte lives and what a pass moves."""
        return self._plan

    def stats(self) -> dict[str, Any]:
        """Counters as a plain dict: bytes per link, waits by cause, memory.

        `last_pass` waits until the device has ended it. Byte counts are payload, but for
        `disk_read_bytes`, which includes alignment. `stall_seconds` says how long the forward
        waited: `disk` and `arena` on the host, `h2d` on the device.
        """
        if self._closed:
            return dict(self._final_stats)
        host_bytes, pinned_bytes = self._engine.memory()
        device_bytes = _engine.device_block_bytes(
            self._planned.arena_bytes
        ) + _engine.device_block_bytes(self._planned.homes_bytes)
        return {
            "passes": self._engine.passes,
            "memory": {
                "device_bytes": device_bytes,
                "device_peak_bytes": device_bytes,
                "device_budget_bytes": self._planned.device_budget_bytes,
                "host_bytes": host_bytes,
                "host_pinned_bytes": pinned_bytes,
                "host_peak_bytes": host_bytes,
                "host_budget_bytes": self._planned.host_budget_bytes,
            },
            "last_pass": self._engine.last_pass(),
            "totals": self._engine.totals(),
            "readers": self._engine.readers(),
            "warnings": list(dict.fromkeys(self._plan.warnings + self._engine.warnings)),
        }

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
        """
        if self._closed:
            return
        try:
            if not self._engine.closed:
                self._give_back_owned()
                self._final_stats = self.stats()
        finally:
            self._closed = True
            self._engine.close()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # no forward may read what is freed now
            with self._residency.passes.between():
                self._residency.undo()
                self._restore_buffers()
            object.__delattr__(self.module, "_wsm_streamed")
            self._finalizer.detach()
            del self._engine, self._residency, self._arena, self._homes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

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


def _resolve_device(device: str | torch.device | None) -> torch.device:
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


def _open(checkpoint: CheckpointLike | None) -> Checkpoint | None:
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return checkpoint
    return Checkpoint.open(checkpoint)


def _engine_options(config: Config) -> _engine.EngineOptions:
    options = _engine.EngineOptions()
    options.reader = getattr(_engine.ReaderChoice, config.reader)
    options.direct = getattr(_engine.DirectMode, config.direct)
    options.read_threads = config.read_threads or 0
    options.read_timeout_s = config.read_timeout_s
    options.poison = config.poison
    options.verbose = config.verbose
    return options

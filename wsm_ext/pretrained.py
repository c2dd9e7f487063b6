"""`from_pretrained`: a transformers model, streamed.

To import transformers and to build a model with it takes seconds, on one core. Meanwhile the
checkpoint is read, and the GPU gets its context, both without the GIL.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import _engine
from .checkpoints.checkpoint import Checkpoint
from .config import Config
from .hf.default_workload import default_workload
from .hf.hub import resolve_folder
from .planning.budgets import preload_room
from .planning.rates import remembered_read_method
from .planning.read_method import engine_options
from .runtime.handle import StreamHandle
from .runtime.request import resolve_device
from .runtime.streamed_class import StreamedModule
from .runtime.trial import Workload

_log = logging.getLogger("wsm_ext")

# Less is read faster than a thread is worth.
_LEAST_PRELOAD_BYTES = 256 << 20


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] | None = "auto",
    auto_class: Any = None,
    device: str | torch.device | None = None,
    device_memory: int | str = "auto",
    host_memory: int | str = "auto",
    units: Any = "auto",
    workload: Workload | None = None,
    verify: bool | str | os.PathLike[str] | None = None,
    config: Config | Mapping[str, Any] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> StreamedModule:
    """Stream the transformers model in the folder `path`, or behind the hub id `path`.

    `dtype` is "auto" (what the config says) or a dtype: tensors that have another are cast when
    they arrive, as transformers does it, what it keeps in fp32 included. None and a dict are taken
    as transformers takes them. `auto_class` is a transformers class, or its name, for a config
    whose `architectures` does not decide, or for a part of the model: tensors of the other parts
    are left out, and told. On a GPU,
    device_memory="auto" leaves room for one sequence of 4096 tokens and its KV cache; state
    `workload` for others. The other arguments are those of `stream`.
    """
    folder = resolve_folder(path, revision=revision, local_files_only=local_files_only)
    settings = Config.resolve(config)
    if verify is not None:
        settings.set_argument("verify", verify)
    with _gpu_context(device):
        opened = _open_weights(folder)
        preload = None
        if opened is not None:
            preload = _preload(opened.shards, device, host_memory, settings)
        try:
            from .hf.building import prepare

            module, checkpoint = prepare(folder, opened, dtype=dtype, auto_class=auto_class)
            # On a CPU the trial would take as long as the forward.
            on_gpu = resolve_device(device).type == "cuda"
            if workload is None and device_memory == "auto" and on_gpu:
                workload = default_workload(module)
            return StreamHandle(
                *(module, checkpoint, device, device_memory, host_memory, units, workload),
                *(settings, progress, preload),
            ).module
        except BaseException:
            if preload is not None:
                preload.drop()  # a traceback may be kept for long, and this with it
            raise


@contextmanager
def _gpu_context(device: str | torch.device | None) -> Iterator[None]:
    """Makes the context of the GPU that will be used, in a thread, and holds it to the end: by then
    the engine does. Errors are ignored here: the real user of the GPU reports them."""
    if _is_cpu(device) or not _engine.built_with_cuda or torch.cuda.is_initialized():
        yield
        return
    index = 0 if device is None else torch.device(device).index or 0
    opened: list[_engine.Device] = []

    def make() -> None:
        try:
            opened.append(_engine.open_device(index))
        except (ValueError, RuntimeError, MemoryError) as error:
            _log.debug("no context was made: %s", error)

    thread = threading.Thread(target=make, name="wsm-context")
    thread.start()
    try:
        yield
    finally:
        thread.join()
        opened.clear()


def _open_weights(folder: Path) -> Checkpoint | None:
    """None where something is wrong, which may be that it holds no weights of its own: `prepare`
    finds and tells it."""
    try:
        return Checkpoint.open(folder)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        _log.debug("nothing is read ahead: %s", error)
        return None


def _preload(
    files: Sequence[Path], device: str | torch.device | None, host_memory: int | str, config: Config
) -> _engine.Preload | None:
    """Begins to read the files into host memory; None where that would be for little. Errors are
    ignored here: the real reader reports them."""
    try:
        size = sum(file.stat().st_size for file in files)
        room = preload_room(_is_cpu(device), host_memory)
        # Of a model that is larger than the budget the cache takes all that is to be had.
        small, large = size < _LEAST_PRELOAD_BYTES, size > room
        if small or large or config.direct == "off" or config.cpu_cache_hwm_layers is not None:
            return None
        options = engine_options(config, remembered_read_method(files, config))
        return _engine.Preload([str(file) for file in files], options, room)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        _log.debug("nothing is read ahead: %s", error)
        return None


def _is_cpu(device: str | torch.device | None) -> bool:
    """Makes no context of a GPU: that takes long."""
    if device is None:
        return not (_engine.built_with_cuda and torch.cuda.is_available())
    return torch.device(device).type == "cpu"

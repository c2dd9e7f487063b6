"""`stream()`: the front door for modules of all kinds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .config import Config
from .runtime.handle import StreamHandle
from .runtime.request import CheckpointLike
from .runtime.session import Progress
from .runtime.streamed_class import StreamedModule
from .runtime.trial import Workload


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

    Returns the module itself. Until `close()` it is a `StreamedModule` too: it has `plan`,
    `stats()`, `fetch()` and so on, and can be used in a `with` statement.

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
    return StreamHandle(
        module, checkpoint, device, device_memory, host_memory, units, workload, settings, progress
    ).module

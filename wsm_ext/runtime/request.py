"""What the arguments of `stream()` stand for: a device, an open checkpoint, settings, checks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _engine
from ..checkpoints.checkpoint import Checkpoint
from ..config import Config
from ..hf.quantised import refuse_quantised_module
from ..modules import sources
from ..modules.unfit import refuse_unfit
from .integrity import Checker

CheckpointLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Checkpoint


@dataclass(frozen=True)
class StreamRequest:
    """A module, and what stays the same as long as it streams."""

    module: nn.Module
    checkpoint: Checkpoint | None  # None: the weights that the module holds in RAM
    device: torch.device
    config: Config
    checker: Checker | None  # where settings ask for it

    @staticmethod
    def of(
        module: nn.Module,
        checkpoint: CheckpointLike | None,
        device: str | torch.device | None,
        config: Config | Mapping[str, Any] | None,
    ) -> StreamRequest:
        """Opens the checkpoint, and the file of hashes. Raises ValueError (CheckpointError) where
        something is wrong, EngineError where there is no such device."""
        refuse_unfit(module)
        refuse_quantised_module(module)
        chosen, settings = resolve_device(device), Config.resolve(config)
        opened = _open(checkpoint)
        if opened is not None:
            sources.check_surplus(module, opened)
        return StreamRequest(module, opened, chosen, settings, _checker(opened, settings))


def resolve_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() and _engine.built_with_cuda else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not a device: use 'cuda', 'cuda:N' or 'cpu'") from (
            error
        )
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


def _checker(checkpoint: Checkpoint | None, config: Config) -> Checker | None:
    verify = config.verify
    if verify is False:
        return None
    setting = config.describe("verify")
    if checkpoint is not None:
        return Checker(checkpoint, None if verify is True else Path(verify).expanduser(), setting)
    if config.sources["verify"] == "variable":  # it is meant for others, which have checkpoints
        config.warnings.append(f"{setting} has no effect: the weights come from the module itself")
        return None
    raise ValueError(
        f"{setting}: the weights come from the module itself, and hashes are those of a checkpoint;"
        " give the checkpoint, or leave verify out"
    )

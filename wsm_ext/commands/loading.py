"""The model that options of `wsm` name, streamed as they say."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)

from ..hf.hub import resolve_folder
from .options import settings_of, units_of


def folder_of(options: argparse.Namespace) -> Path:
    """The folder of the model, here or in the hub's cache; may download it."""
    return resolve_folder(
        options.model, revision=options.revision, local_files_only=options.local_files_only
    )


@contextmanager
def load(
    options: argparse.Namespace, path: Any, device: torch.device, **replaced: Any
) -> Iterator[tuple[Any, float]]:
    """The model as the options say; `replaced`: budgets, and settings added to theirs."""
    from ..pretrained import from_pretrained

    config = settings_of(options) | replaced.pop("config", {})
    budgets = {"device_memory": options.device_memory, "host_memory": options.host_memory}
    begin = time.perf_counter()
    with progress_bar("loading resident weights") as progress:
        model = from_pretrained(
            path,
            dtype=options.dtype,
            device=device,
            **{**budgets, **replaced},
            units=units_of(options),
            config={key: value for key, value in config.items() if value is not None},
            revision=options.revision,
            local_files_only=options.local_files_only,
            progress=progress,
        )
    with model:
        yield model, time.perf_counter() - begin


@contextmanager
def progress_bar(what: str, *more: Any) -> Iterator[Callable[[int, int], None]]:
    """What is called with bytes done and bytes in all, and draws them."""
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        *more,
    )
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("")

    def update(done: int, total: int) -> None:
        if total == 0:  # nothing is loaded first: nothing is shown
            return
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()

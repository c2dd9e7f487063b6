"""The model that options of `wsm` name, streamed as they say."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def units(options: argparse.Namespace) -> Any:
    """As `stream` takes them."""
    named = options.units not in ("auto", "layer", "group", "leaf")
    return options.units.split(",") if named else options.units


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    given = {
        "lookahead_units": options.lookahead,
        "reader": options.reader,
        "direct": options.direct,
        "measure": False if options.no_measure else None,
        "verify": True if options.verify else None,
    }
    return {key: value for key, value in given.items() if value is not None}


@contextmanager
def load(
    options: argparse.Namespace, path: Any, device: torch.device, **replaced: Any
) -> Iterator[tuple[Any, float]]:
    """The model as the options say; `replaced`: budgets, and settings added to theirs."""
    from ..pretrained import from_pretrained

    config = settings(options) | replaced.pop("config", {})
    budgets = {"device_memory": options.device_memory, "host_memory": options.host_memory}
    begin = time.perf_counter()
    with progress_bar("loading resident weights") as progress:
        model = from_pretrained(
            path,
            dtype=options.dtype,
            device=device,
            **{**budgets, **replaced},
            units=units(options),
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

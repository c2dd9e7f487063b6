"""Hashes a checkpoint into its sidecar, and later compares the two."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .hashes import Recorded, hash_tensors, new_hash, read_sidecar, sidecar_of, write_sidecar
from .image import CheckpointError

Progress = Callable[[int, int], None]


@dataclass
class Verified:
    """What was found: names of tensors by how they differ from the sidecar. `wrote`: it was made
    now, of what the files have."""

    sidecar: Path
    wrote: bool
    tensors: int
    bytes: int = 0
    seconds: float = 0.0
    differ: list[str] = field(default_factory=list)  # other bytes
    changed: list[str] = field(default_factory=list)  # another dtype or shape
    missing: list[str] = field(default_factory=list)  # in the sidecar, not in the checkpoint
    new: list[str] = field(default_factory=list)  # in the checkpoint, not in the sidecar
    details: dict[str, str] = field(default_factory=dict)  # by name: what is where

    @property
    def equal(self) -> bool:
        return not (self.differ or self.changed or self.missing or self.new)

    def as_dict(self) -> dict[str, Any]:
        return {
            "sidecar": str(self.sidecar),
            "wrote": self.wrote,
            "equal": self.equal,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "differ": self.differ,
            "changed": self.changed,
            "missing": self.missing,
            "new": self.new,
            "details": self.details,
        }


def verify(
    checkpoint: Checkpoint,
    sidecar: Path | None = None,
    *,
    update: bool = False,
    progress: Progress | None = None,
) -> Verified:
    """Compare the checkpoint with its sidecar; write the sidecar if there is none, or `update`.

    Every byte is read once, past the page cache. `progress` gets (bytes done, bytes in all).
    Raises CheckpointError for a sidecar that is not valid or of another model, OSError and
    TimeoutError if reading or writing fails.
    """
    new_hash()  # first of all: is the package there?
    path = sidecar_of(checkpoint) if sidecar is None else sidecar
    if update or not path.exists():
        return _record(checkpoint, path, progress)
    return _compare(checkpoint, path, progress)


def _record(checkpoint: Checkpoint, path: Path, progress: Progress | None) -> Verified:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file for the hashes (--sidecar FILE)")
    if not os.access(path.parent, os.W_OK):  # now, not when all is read
        raise CheckpointError(
            f"{path.parent} cannot be written to: name another file for the hashes (--sidecar FILE)"
        )
    hashes, nbytes, seconds = _hashes_of(checkpoint, list(checkpoint.tensors), progress)
    write_sidecar(path, hashes)
    return Verified(path, True, len(hashes), nbytes, seconds)


def _compare(checkpoint: Checkpoint, path: Path, progress: Progress | None) -> Verified:
    recorded = read_sidecar(path)
    tensors = checkpoint.tensors
    common = [name for name in tensors if name in recorded]
    if not common:
        raise CheckpointError(
            f"{path} and the checkpoint have no tensor's name in common: it is of another model"
        )
    changed = {
        name: f"{_kind(recorded[name])} was recorded, the file has {_kind(tensors[name])}"
        for name in common
        if not recorded[name].describes(tensors[name])
    }
    comparable = [name for name in common if name not in changed]
    hashes, nbytes, seconds = _hashes_of(checkpoint, comparable, progress)
    differ = [name for name in comparable if hashes[name].digest != recorded[name].digest]
    details = changed | {
        name: f"{_place(checkpoint, name)}: its hash is {hashes[name].digest},"
        f" {recorded[name].digest} was recorded"
        for name in differ
    }
    new = sorted(tensors.keys() - recorded.keys())
    details |= {name: _place(checkpoint, name) for name in new}
    missing = sorted(recorded.keys() - tensors.keys())
    return Verified(
        path, False, len(recorded), nbytes, seconds, differ, list(changed), missing, new, details
    )


def _hashes_of(
    checkpoint: Checkpoint, names: list[str], progress: Progress | None
) -> tuple[dict[str, Recorded], int, float]:
    total = sum(checkpoint.tensors[name].nbytes for name in names)
    begin = time.perf_counter()
    hashes = hash_tensors(
        checkpoint, names, None if progress is None else lambda done: progress(done, total)
    )
    return hashes, total, time.perf_counter() - begin


def _kind(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _place(checkpoint: Checkpoint, name: str) -> str:
    extents = checkpoint.tensors[name].extents
    if not extents:
        return "no bytes"
    return f"{checkpoint.shards[extents[0].shard]}, offset {extents[0].offset}"

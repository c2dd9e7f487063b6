"""Hashes of a checkpoint's tensors, and the sidecar file that keeps them.

A tensor is known by its name, dtype and shape, not by the file it lies in: a checkpoint may be cut
into other shards, or renamed, and its hashes stay. The hash is XXH3-128 of the package xxhash. It
finds what went wrong by accident; who can write the files can write the sidecar too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..atomic_write import write_atomically
from ..wording import shown
from .bulk_reads import Blocks, read_all
from .checkpoint import Checkpoint
from .files import read_json
from .header import TORCH_NAMES
from .image import CheckpointError, TensorImage

SIDECAR = "wsm-hashes.json"
MAX_SIDECAR_BYTES = 64 << 20

_HEAD = {"format": "wsm-hashes", "version": 1, "hash": "xxh3_128"}
_DIGEST = re.compile("[0-9a-f]{32}")
_DTYPES = frozenset(TORCH_NAMES.values())
_MOST_ITEMS = 2**63
_ANEW = "write it anew: wsm verify --update"


@dataclass(frozen=True)
class Recorded:
    """What a tensor is, and the hash of its bytes, in hexadecimal."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: str

    def describes(self, image: TensorImage) -> bool:
        return (self.dtype, self.shape) == (image.dtype, tuple(image.shape))


def new_hash() -> Any:
    """An XXH3-128 that takes bytes by `update`. Raises ImportError if xxhash is missing."""
    try:
        import xxhash
    except ImportError as error:
        raise ImportError(
            "hashes need the package xxhash, which is not installed: pip install xxhash (or"
            ' "wsm_ext[verify]")'
        ) from error
    return xxhash.xxh3_128()


# Hashing


class ByteRun(NamedTuple):
    """Bytes of a tensor, one after another."""

    offset: int  # in the tensor
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


Share = tuple[ByteRun, ...]  # of a tensor's bytes; ascending


@dataclass(frozen=True)
class ExtentToHash:
    """A tensor's extent, and shares of it that get hashes of their own."""

    shard: int
    offset: int
    nbytes: int
    shares: tuple[Share, ...] = ()


@dataclass(frozen=True)
class ExtentHashes:
    """Of all of an extent, and of its shares, in hexadecimal."""

    digest: str
    shares: list[str]


def hash_extents(
    files: Sequence[Path],
    extents: Sequence[ExtentToHash],
    progress: Callable[[int], None] | None = None,
) -> list[ExtentHashes]:
    """Of each extent, in their order. Raises as `read_all` does."""
    new_hash()
    return read_all(files, extents, _hash_extent, progress)


def _hash_extent(extent: ExtentToHash, blocks: Blocks) -> ExtentHashes:
    whole = new_hash()
    shares = [new_hash() for _ in extent.shares]
    begin = 0
    for block in blocks:
        whole.update(block)
        end = begin + len(block)
        for share, runs in zip(shares, extent.shares, strict=True):
            for run in runs:
                first, last = max(begin, run.offset), min(end, run.end)
                if first < last:
                    share.update(block[first - begin : last - begin])
        begin = end
    return ExtentHashes(whole.hexdigest(), [share.hexdigest() for share in shares])


def hash_tensors(
    checkpoint: Checkpoint,
    names: Sequence[str],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Recorded]:
    """Hashes of these tensors, which must be as the files have them."""
    images = [checkpoint.tensors[name] for name in names]
    for image in images:
        if len(image.extents) > 1 or image.arrival is not None:
            raise CheckpointError(
                f"{image.name!r} is made of tensors of the files: hash these, by the checkpoint as"
                " it was opened"
            )
    extents = [ExtentToHash(e.shard, e.offset, e.nbytes) for image in images for e in image.extents]
    hashed = iter(hash_extents(checkpoint.shards, extents, progress))
    nothing = new_hash().hexdigest()
    return {
        image.name: Recorded(
            image.dtype, tuple(image.shape), next(hashed).digest if image.extents else nothing
        )
        for image in images
    }


# The sidecar


def sidecar_of(checkpoint: Checkpoint) -> Path:
    """Where the checkpoint's sidecar lies by default: in its folder, or beside its file."""
    source = checkpoint.source
    if source is None:
        raise CheckpointError(
            "a checkpoint that is a list of files has no place for its hashes: name the sidecar"
        )
    return source / SIDECAR if source.is_dir() else source.with_name(f"{source.name}.{SIDECAR}")


def write_sidecar(path: Path, hashes: Mapping[str, Recorded]) -> None:
    """The file appears whole or not at all, and is the same for the same tensors."""
    lines = ",\n".join(
        f"  {json.dumps(name)}: "
        + json.dumps({"dtype": _name(h.dtype), "shape": list(h.shape), "hash": h.digest})
        for name, h in sorted(hashes.items())
    )
    head = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in _HEAD.items())
    write_atomically(path, f'{{\n{head} "tensors": {{\n{lines}\n }}\n}}\n')


def read_sidecar(path: Path) -> dict[str, Recorded]:
    """The validated sidecar. Raises CheckpointError saying what is wrong with it."""
    content = read_json(path, "a sidecar", MAX_SIDECAR_BYTES, _ANEW)
    if not isinstance(content, dict) or content.get("format") != _HEAD["format"]:
        raise CheckpointError(f"{path} is not a sidecar of `wsm verify`; name the right file")
    for key in ("version", "hash"):
        value = content.get(key)
        if type(value) is not type(_HEAD[key]) or value != _HEAD[key]:
            raise CheckpointError(
                f"{path}: its {key} is {shown(value)}, and {_HEAD[key]!r} is all that this wsm_ext"
                " knows; write it anew (wsm verify --update), or use the wsm_ext that wrote it"
            )
    tensors = content.get("tensors")
    if not isinstance(tensors, dict) or not tensors:
        raise CheckpointError(f"{path} lists no tensors; {_ANEW}")
    return {name: _recorded(path, name, entry) for name, entry in tensors.items()}


def _recorded(path: Path, name: str, entry: Any) -> Recorded:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, digest = (entry.get(key) for key in ("dtype", "shape", "hash"))
    named = isinstance(dtype, str) and dtype in _DTYPES
    torch_dtype = getattr(torch, dtype, None) if named else None
    if (
        not isinstance(torch_dtype, torch.dtype)
        or not isinstance(shape, list)
        or not all(type(size) is int and 0 <= size < _MOST_ITEMS for size in shape)
        or not isinstance(digest, str)
        or not _DIGEST.fullmatch(digest)
    ):
        raise CheckpointError(
            f"{path}: the entry of tensor {name!r} is {shown(entry)}, not a dtype, a shape and a"
            f" hash of 32 digits; {_ANEW}"
        )
    return Recorded(torch_dtype, tuple(shape), digest)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

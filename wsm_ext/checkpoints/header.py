"""The header of a safetensors file, and the tensor images that it describes."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..wording import printable, shown
from .files import file_size, raise_refused
from .image import CheckpointError, Extent, TensorImage

MAX_DIMENSIONS = 64

_MOST_HEADER_BYTES = 128 << 20  # safetensors takes no larger one
TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
_SUB_BYTE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})


def read_header(file: Path, shard: int) -> tuple[list[TensorImage], dict[str, str]]:
    size = file_size(file)
    try:
        position = _end_of_header(file)
        with safe_open(file, framework="pt", backend="pread") as header:
            slices = [(name, header.get_slice(name)) for name in header.offset_keys()]
            listed = [(name, s.get_shape(), s.get_dtype()) for name, s in slices]
            metadata = header.metadata() or {}
    except (SafetensorError, OSError, MemoryError) as error:
        raise_refused(file, error)
        raise CheckpointError(
            f"{file} cannot be read as safetensors: {printable(error)}; download it again if it is"
            " not whole"
        ) from error
    images: list[TensorImage] = []
    for name, shape, code in listed:
        dtype = _dtype(code, file, name)
        if len(shape) > MAX_DIMENSIONS:
            raise CheckpointError(
                f"{file}: tensor {shown(name)} has {len(shape)} dimensions, more than"
                f" {MAX_DIMENSIONS}"
            )
        if prod(max(dimension, 1) for dimension in shape) >= 2**63:
            raise CheckpointError(  # one dimension is 0, and others are as large as one likes
                f"{file}: tensor {shown(name)} has a shape that torch cannot count: {shape}"
            )
        nbytes = prod(shape) * dtype.itemsize
        extents = (Extent(shard, position, nbytes),) if nbytes else ()
        images.append(TensorImage(name, dtype, tuple(shape), extents))
        position += nbytes
    if position != size:
        raise CheckpointError(
            f"{file} has {size} bytes, but its header describes {position}; download it again"
        )
    return images, metadata


def _end_of_header(file: Path) -> int:
    """Where the weights begin. What lies before is in the page cache then, and nothing else: the
    reading ahead that others' reads set off would bring megabytes of each shard.
    """
    with open(file, "rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        position = 8 + int.from_bytes(stream.read(8), "little")
        if position <= _MOST_HEADER_BYTES:
            os.posix_fadvise(stream.fileno(), 0, position, os.POSIX_FADV_WILLNEED)
    return position


def _dtype(code: str, file: Path, name: str) -> torch.dtype:
    if code in _SUB_BYTE:
        raise CheckpointError(
            f"{file}: tensor {shown(name)} has dtype {code}, smaller than a byte, which cannot be"
            " streamed; convert it to a dtype of whole bytes"
        )
    dtype = getattr(torch, TORCH_NAMES.get(code, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"{file}: tensor {shown(name)} has dtype {code}, which torch {torch.__version__} does"
            " not know; a newer torch may"
        )
    return dtype

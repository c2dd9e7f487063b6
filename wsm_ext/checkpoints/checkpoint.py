"""Safetensors checkpoints as byte ranges: tensor images over shards.

Only headers are read. The `safetensors` package decides what a valid file is; since the format
leaves no holes, tensor offsets follow from the order and the sizes of the tensors.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .arrival import Arrival

INDEX_SUFFIX = ".safetensors.index.json"
# As much as the safetensors package reads of a header; the largest indices have some 10 MB.
MAX_INDEX_BYTES = 100_000_000
MAX_DIMENSIONS = 64

_MOST_HEADER_BYTES = 128 << 20  # safetensors takes no larger one
_LONGEST_PATH = 4096
_MOST_SHOWN = 300  # characters of a name in a message

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TORCH_NAMES = {
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


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; names the file and the tensor, and what to do."""


@dataclass(frozen=True)
class Extent:
    """A byte range in a shard, with its place inside the tensor."""

    shard: int
    offset: int
    nbytes: int
    tensor_offset: int = 0


@dataclass(frozen=True)
class TensorImage:
    """Where a tensor's bytes come from. The extents cover it exactly once.

    With an arrival transform they bring what the tensor of this dtype and shape is made of.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    arrival: Arrival | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def arriving_bytes(self) -> int:
        """What the extents bring."""
        return self.nbytes if self.arrival is None else self.arrival.nbytes


def assemble(name: str, parts: Sequence[TensorImage], shape: Sequence[int]) -> TensorImage:
    """One image of `parts` laid one after the other: a stack or a concatenation along dim 0."""
    if not parts:
        raise CheckpointError(f"{name!r} cannot be assembled from no tensors")
    first = parts[0]
    extents: list[Extent] = []
    position = 0
    for part in parts:
        if part.arrival is not None:
            raise CheckpointError(
                f"{name!r} cannot be assembled: {part.name!r} is made when its bytes arrive; give"
                " tensors as they are in the file"
            )
        if part.dtype != first.dtype:
            raise CheckpointError(
                f"{name!r} cannot be assembled: {first.name!r} is {first.dtype},"
                f" {part.name!r} is {part.dtype}; convert the checkpoint to one dtype"
            )
        extents += [replace(e, tensor_offset=e.tensor_offset + position) for e in part.extents]
        position += part.nbytes
    image = TensorImage(name, first.dtype, tuple(shape), tuple(extents))
    if image.nbytes != position:
        raise CheckpointError(
            f"{name!r} of shape {list(shape)} needs {image.nbytes} bytes, but the {len(parts)}"
            f" tensors from {first.name!r} to {parts[-1].name!r} have {position}"
        )
    return image


@dataclass
class Checkpoint:
    """Tensor images by name, over `shards`: real files, symbolic links resolved.

    `computed`: parameters that no file has, since they can be computed. Their values are in RAM.
    `source`: the file or folder that was opened; None for a list of files.
    """

    shards: list[Path]
    tensors: dict[str, TensorImage]
    metadata: dict[str, str] = field(default_factory=dict)
    computed: dict[str, torch.Tensor] = field(default_factory=dict)
    source: Path | None = None

    @classmethod
    def open(cls, source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Checkpoint:
        """Read the headers of one file, a folder, an index file, or a list of files."""
        if not isinstance(source, (str, os.PathLike)):
            return cls._of_files([Path(path) for path in source])
        if not os.fspath(source):
            raise CheckpointError("the checkpoint's path is empty: give a file or a folder")
        path = Path(source)
        chosen = _choose(path) if os.path.isdir(path) else [path]
        if len(chosen) == 1 and chosen[0].name.endswith(INDEX_SUFFIX):
            return replace(cls._of_index(chosen[0]), source=path)
        return replace(cls._of_files(chosen), source=path)

    def stored(self) -> list[list[TensorImage]]:
        """By shard: every tensor as the file has it, in its order. Reads the headers again."""
        return [_read_header(file, shard)[0] for shard, file in enumerate(self.shards)]

    @classmethod
    def _of_files(cls, files: list[Path]) -> Checkpoint:
        if not files:
            raise CheckpointError("the list of files is empty: give at least one safetensors file")
        checkpoint = cls([], {})
        origin: dict[str, Path] = {}
        for file in files:
            for image in checkpoint._add(file):
                if image.name in origin:
                    raise CheckpointError(
                        f"tensor {_shown(image.name)} is in {origin[image.name]} and in {file};"
                        " give the files of one checkpoint, each once"
                    )
                origin[image.name] = file
                checkpoint.tensors[image.name] = image
        return checkpoint

    @classmethod
    def _of_index(cls, index: Path) -> Checkpoint:
        weight_map = _read_index(index)
        names_in: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            names_in.setdefault(file, []).append(name)
        checkpoint = cls([], {})
        unlisted: list[str] = []
        for file, names in names_in.items():
            shard = index.parent / file
            if _is_missing(shard):
                raise CheckpointError(
                    f"{_absent(shard)}: {index} places {_some(names)} there; download it again"
                )
            images = {image.name: image for image in checkpoint._add(shard)}
            lacking = [name for name in names if name not in images]
            if lacking:
                raise CheckpointError(
                    f"{shard} has no tensor {_some(lacking)}, but {index} says so; the index and"
                    " the shards are not of one checkpoint: download both again"
                )
            unlisted += [name for name in images if name not in weight_map]
            checkpoint.tensors.update((name, images[name]) for name in names)
        if unlisted:
            warnings.warn(
                f"{index} does not list {len(unlisted)} tensors that its shards have; they are"
                f" left out: {_some(unlisted)}",
                stacklevel=3,
            )
        return checkpoint

    def _add(self, file: Path) -> list[TensorImage]:
        """Append a shard; its images in file order."""
        images, metadata = _read_header(file, len(self.shards))
        self.shards.append(file.resolve())
        for key, value in metadata.items():
            self.metadata.setdefault(key, value)
        return images


def _choose(folder: Path) -> list[Path]:
    """The folder's checkpoint: its index alone, or all of its files."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        _raise_refused(folder, error)
        raise CheckpointError(f"{folder} cannot be listed: {error}") from error
    files = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if "model.safetensors" in files:  # goes before an index, as in transformers
        unused = [name for name in files + indices if name != "model.safetensors"]
        if unused:
            warnings.warn(
                f"{folder}: model.safetensors is used, {_some(unused)} not; to use others, give"
                " the index or a list of files",
                stacklevel=3,
            )
        return [folder / "model.safetensors"]
    if "model" + INDEX_SUFFIX in indices:
        return [folder / ("model" + INDEX_SUFFIX)]
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder} has several indices: {_some(indices)}; give the one that is meant"
        )
    chosen = indices or files
    if not chosen:
        pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
        advice = f"convert {_some(pickles)} to safetensors" if pickles else "check the path"
        raise CheckpointError(f"{folder} has no *.safetensors file; {advice}")
    return [folder / name for name in chosen]


def _raise_refused(path: Path, error: BaseException) -> None:
    """What the system refuses this process says nothing about the file or folder."""
    if isinstance(error, MemoryError):
        raise MemoryError(
            f"no memory to read the header of {path}: {error}; free some, or raise the limit on"
            " address space (ulimit -v), which a whole file must fit into"
        ) from error
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise OSError(
            error.errno, f"{error.strerror}: raise the limit on open files (ulimit -n)", str(path)
        ) from error


def _read_header(file: Path, shard: int) -> tuple[list[TensorImage], dict[str, str]]:
    size = _file_size(file)
    try:
        position = _end_of_header(file)
        with safe_open(file, framework="pt", backend="pread") as header:
            slices = [(name, header.get_slice(name)) for name in header.offset_keys()]
            listed = [(name, s.get_shape(), s.get_dtype()) for name, s in slices]
            metadata = header.metadata() or {}
    except (SafetensorError, OSError, MemoryError) as error:
        _raise_refused(file, error)
        raise CheckpointError(
            f"{file} cannot be read as safetensors: {_printable(error)}; download it again if it is"
            " not whole"
        ) from error
    images: list[TensorImage] = []
    for name, shape, code in listed:
        dtype = _dtype(code, file, name)
        if len(shape) > MAX_DIMENSIONS:
            raise CheckpointError(
                f"{file}: tensor {_shown(name)} has {len(shape)} dimensions, more than"
                f" {MAX_DIMENSIONS}"
            )
        if prod(max(dimension, 1) for dimension in shape) >= 2**63:
            raise CheckpointError(  # one dimension is 0, and others are as large as one likes
                f"{file}: tensor {_shown(name)} has a shape that torch cannot count: {shape}"
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


def _absent(file: Path) -> str:
    """As in the hub's cache, where a snapshot's link may outlive its blob."""
    if file.is_symlink():
        return f"{file} links to {os.readlink(file)}, which is missing"
    return f"{file} is missing"


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


def _is_missing(file: Path) -> bool:
    """Also a link to nothing. What else may be wrong with a path, opening it tells."""
    try:
        os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _file_size(file: Path) -> int:
    if file.name.endswith(_PICKLE_SUFFIXES):
        raise CheckpointError(
            f"{file} is a pickle, which may run code when loaded: convert it to safetensors"
            " (safetensors.torch.save_file)"
        )
    try:
        status = os.stat(file)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and file.is_symlink():
            raise CheckpointError(f"{_absent(file)}; download it again") from error
        raise CheckpointError(f"{file} cannot be opened: {error}; check the path") from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise CheckpointError(f"{file} is not a regular file: give a safetensors file or a folder")
    return status.st_size


def _dtype(code: str, file: Path, name: str) -> torch.dtype:
    if code in _SUB_BYTE:
        raise CheckpointError(
            f"{file}: tensor {_shown(name)} has dtype {code}, smaller than a byte, which cannot be"
            " streamed; convert it to a dtype of whole bytes"
        )
    dtype = getattr(torch, _TORCH_NAMES.get(code, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"{file}: tensor {_shown(name)} has dtype {code}, which torch {torch.__version__} does"
            " not know; a newer torch may"
        )
    return dtype


def _read_index(index: Path) -> dict[str, str]:
    """The validated `weight_map`: tensor name to a relative path inside the index's folder."""
    if _file_size(index) > MAX_INDEX_BYTES:
        raise CheckpointError(f"{index} is larger than {MAX_INDEX_BYTES} bytes: no index is")
    try:
        with open(index, "rb") as stream:
            content = json.loads(
                stream.read(MAX_INDEX_BYTES).decode("utf-8"), object_pairs_hook=_unique_keys
            )
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not valid JSON: {error}; download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no object 'weight_map': it is no safetensors index")
    if not weight_map:
        raise CheckpointError(f"{index} has an empty 'weight_map': it lists no tensors")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{index}: the file of tensor {_shown(name)} is {_shown(file)}, not a name"
            )
        problem = _path_problem(file)
        if problem:
            raise CheckpointError(
                f"{index}: the file of tensor {_shown(name)}, {_shown(file)}, {problem}"
            )
    return weight_map


def _path_problem(file: str) -> str | None:
    """Why an index entry is refused. Lexical: symbolic links may lead anywhere (hub caches)."""
    path = PureWindowsPath(file[:_LONGEST_PATH])  # splits at both kinds of slashes
    if len(file) > _LONGEST_PATH or not file.isprintable() or not path.parts:
        return "is not a file name"  # nor is it shown to a terminal as it is
    if path.anchor:
        return "is absolute: shards lie in the index's folder"
    if ".." in path.parts:
        return "leaves the folder of the index, which is refused"
    if not file.endswith(".safetensors"):
        return "is not a safetensors file: convert the checkpoint to safetensors"
    return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {_shown(twice)} occurs twice")
    return result


def _printable(error: Exception) -> str:
    """What an error says, and no control characters that it quotes of the file."""
    text = str(error)[:_MOST_SHOWN]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _shown(value: object) -> str:
    """`repr`, but for long ones."""
    text = repr(value[:_MOST_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = sorted(names)
    shown = ", ".join(_shown(name) for name in listed[:most])
    return shown + (f" and {len(listed) - most} more" if len(listed) > most else "")

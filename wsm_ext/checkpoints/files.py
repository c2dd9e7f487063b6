"""What is asked of a file before it is read: is it there, is it regular, is it small enough."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from ..wording import shown
from .image import CheckpointError

GGUF_ADVICE = (
    ", which is not supported: take the model's safetensors files, or load this one by"
    " transformers' from_pretrained(folder, gguf_file=...,"
    " quantization_config=GgufConfig(dequantize=True)), and save_pretrained(folder,"
    " save_original_format=False)"
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def file_size(file: Path) -> int:
    if is_gguf(file):
        raise CheckpointError(f"{file} is a GGUF file{GGUF_ADVICE}")
    if is_pickle(file.name):
        raise CheckpointError(
            f"{file} is a pickle, which may run code when loaded: convert it to safetensors"
            " (safetensors.torch.save_file)"
        )
    try:
        status = os.stat(file)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and file.is_symlink():
            raise CheckpointError(f"{absent(file)}; download it again") from error
        raise CheckpointError(f"{file} cannot be opened: {error}; check the path") from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise CheckpointError(f"{file} is not a regular file: give a safetensors file or a folder")
    return status.st_size


def absent(file: Path) -> str:
    """As in the hub's cache, where a snapshot's link may outlive its blob."""
    if file.is_symlink():
        return f"{file} links to {os.readlink(file)}, which is missing"
    return f"{file} is missing"


def is_missing(file: Path) -> bool:
    """Also a link to nothing. Whatever else is wrong with a path, opening it reports."""
    try:
        os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def raise_refused(path: Path, error: BaseException) -> None:
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


def is_gguf(file: Path) -> bool:
    """By its name, or its first bytes."""
    if file.name.endswith(".gguf"):
        return True
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            return False
        with open(file, "rb", buffering=0) as stream:
            # No read-ahead: it would leave pages behind, and streaming takes them for older ones.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            return stream.read(4) == b"GGUF"
    except (OSError, ValueError):
        return False


def is_pickle(name: str) -> bool:
    return name.endswith(_PICKLE_SUFFIXES)


def read_json(file: Path, what: str, most_bytes: int, advice: str) -> Any:
    """What a JSON file holds, in which no key may occur twice. `what` it is, and the `advice` if
    it is not, are for the error."""
    if file_size(file) > most_bytes:
        raise CheckpointError(f"{file} is too large for {what} (limit: {most_bytes} bytes)")
    try:
        with open(file, "rb") as stream:
            text = stream.read(most_bytes).decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique_keys)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}; {advice}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {shown(twice)} occurs twice")
    return result

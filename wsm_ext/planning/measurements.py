"""Remembers measurements between runs, in one JSON file of the user's cache folder.

An entry is for one machine, device or file system, and version of this package, all of which are in
its key; it expires after 30 days. Losing the file costs a second or two, so nothing about it is an
error: what cannot be read or written is said once in the log.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .._engine import __version__
from ..atomic_write import write_atomically

_log = logging.getLogger("wsm_ext")

_FORMAT = 1
_KEPT_SECONDS = 30 * 86400
_MOST_BYTES = 16 << 20
_MODE = 0o600  # its keys name the machine, and what is mounted
_MOUNTS = Path("/proc/self/mountinfo")
# What JSON of another shape, or numbers of another size, raise.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def cache_file() -> Path:
    """Under `$XDG_CACHE_HOME`, else `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A path that is not absolute counts as unset: so says the specification.
    folder = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))
    return folder / "wsm_ext" / "measurements.json"


def key_of(what: str, *where: str) -> str:
    """The name of an entry: what was measured, on what, of this machine and version."""
    return " | ".join((what, *where, platform.node() or "unknown", f"wsm_ext {__version__}"))


def device_name(device: torch.device) -> str:
    """The same for the same card, however the devices are numbered."""
    if device.type != "cuda":
        return f"host {platform.machine()}, {os.cpu_count()} cores"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {getattr(properties, 'uuid', device.index)}"


def file_system(path: Path, mounts: Path = _MOUNTS) -> str:
    """Source and type of the mount that holds `path` (device numbers change between boots)."""
    resolved = path.resolve()
    deepest, mount = -1, "unknown"
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return mount
    for line in lines:
        # "36 35 98:0 /root /point rw,noatime master:1 - ext4 /dev/sda1 rw"
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 5 or len(rest) < 2:
            continue
        point = Path(_unescaped(fields[4]))
        depth = len(point.parts)
        if depth >= deepest and resolved.is_relative_to(point):  # of two on one point, the later
            deepest, mount = depth, f"{_unescaped(rest[1])} {rest[0]}"
    return mount


def _unescaped(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


class Measurements:
    """The entries of one file. `get`, `put` and `drop`; every change is written at once."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = cache_file() if path is None else path
        self._entries = self._load()

    def get(self, key: str) -> Any | None:
        """The value, or None if there is none, or one that has expired."""
        entry = self._entries.get(key)
        if entry is None or not 0 <= time.time() - entry["time"] <= _KEPT_SECONDS:
            return None
        return entry["value"]

    def put(self, key: str, value: Any) -> None:
        """`value`: what JSON can hold."""
        self._entries = self._load(quiet=True)  # what another process has added meanwhile
        self._entries[key] = {"value": value, "time": time.time()}
        self._write()

    def drop(self, keys: Iterable[str]) -> None:
        """The entries of these names, if there are any, are gone."""
        self._entries = self._load(quiet=True)
        for key in keys:
            self._entries.pop(key, None)
        self._write()

    def _write(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"format": _FORMAT, "entries": self._entries}, indent=1)
            write_atomically(self._path, content + "\n", _MODE)
        except (OSError, RecursionError) as error:
            _log.warning("measurements are not kept for the next run: %s", error)

    def _read(self) -> bytes:
        """Of a regular file alone: opening a pipe would wait for ever."""
        handle = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ValueError("it is not a regular file")
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        return content

    def _load(self, quiet: bool = False) -> dict[str, Any]:
        try:
            content = json.loads(self._read())
            entries = content["entries"] if content["format"] == _FORMAT else {}
            return {
                key: {"value": e["value"], "time": float(e["time"])} for key, e in entries.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, *_DAMAGED) as error:
            if not quiet:
                _log.warning(
                    "%s is ignored, and written anew when something is measured: %s",
                    self._path,
                    error or type(error).__name__,
                )
            return {}

"""Drops files from the page cache, and proves by the kernel's own count that they are gone."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_CACHESTAT = 451  # the same number on every architecture
_TMPFS = 0x01021994
_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


class NotColdError(RuntimeError):
    """A file stays in the page cache: what would be measured is memory, not the disk."""


def _cachestat(fd: int, size: int) -> int | None:
    answer = _Stat()
    whole = _Range(0, size)
    failed = _libc.syscall(
        ctypes.c_long(_CACHESTAT), fd, ctypes.byref(whole), ctypes.byref(answer), ctypes.c_uint(0)
    )
    return None if failed else int(answer.cached)


def _mincore(fd: int, size: int) -> int:
    view = mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
    try:
        pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        resident = (ctypes.c_ubyte * pages)()
        first = ctypes.c_char.from_buffer(view)
        address = ctypes.c_void_p(ctypes.addressof(first))
        failed = _libc.mincore(address, ctypes.c_size_t(size), resident)
        del first
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return sum(page & 1 for page in resident)
    finally:
        view.close()


def cached_pages(path: Path, method: str = "auto") -> int:
    """Pages of the file in the page cache, by cachestat, mincore, or (auto) the first to answer."""
    size = path.stat().st_size
    if size == 0:
        return 0
    fd = os.open(path, os.O_RDONLY)
    try:
        if method != "mincore":
            cached = _cachestat(fd, size)
            if cached is not None:
                return cached
            if method == "cachestat":
                raise OSError(ctypes.get_errno(), "this kernel has no cachestat (6.5 or newer)")
        return _mincore(fd, size)
    finally:
        os.close(fd)


def on_tmpfs(path: Path) -> bool:
    """Whether the file is memory already: it can be neither dropped nor cold."""
    buffer = (ctypes.c_long * 64)()  # struct statfs opens with f_type
    if _libc.statfs(os.fsencode(path), buffer):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return buffer[0] == _TMPFS


def drop(paths: Iterable[Path]) -> None:
    """Writes back what is dirty, then asks the kernel to forget the files' pages."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def make_cold(paths: Iterable[Path], attempts: int = 5) -> dict[str, int]:
    """Drops the files; returns the proof, the pages still cached: all 0, else NotColdError."""
    files = [path.resolve() for path in paths]
    for path in files:
        if on_tmpfs(path):
            raise NotColdError(f"{path} lies on tmpfs: it is memory and cannot be cold")
    left: dict[str, int] = {}
    for _ in range(attempts):
        drop(files)
        left = {path.name: cached_pages(path) for path in files}
        if not any(left.values()):
            return left
    warm = {name: pages for name, pages in left.items() if pages}
    raise NotColdError(
        f"pages stay in the page cache: {warm}; is another process mapping the files?"
    )

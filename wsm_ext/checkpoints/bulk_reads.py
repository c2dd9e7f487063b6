"""Reads extents of files past the page cache, at the speed of the disk, in little memory.

A few threads each take one extent after another and hand its blocks to whoever wants them, in
order. Direct reads if the file allows them; else what the page cache did not have before is
dropped from it again, so that other files stay there.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from .. import _engine

BLOCK_BYTES = 4 << 20
THREADS = 8
_LOOK_S = 0.1
_PATIENCE_S = 30.0


class FileExtent(Protocol):
    """Bytes of a file."""

    @property
    def shard(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=FileExtent)
R = TypeVar("R")
Blocks = Iterator[memoryview]


def read_all(
    files: Sequence[Path],
    extents: Sequence[S],
    use: Callable[[S, Blocks], R],
    progress: Callable[[int], None] | None = None,
    patience_s: float = _PATIENCE_S,
) -> list[R]:
    """What `use` makes of each extent, in their order.

    `use` runs on several threads, and takes the blocks of its extent to the end; a block is valid
    until the next one. `progress` is called on this thread with the bytes done.

    Raises OSError if a read fails or a file changes meanwhile, TimeoutError if nothing is
    read for `patience_s`, and whatever `use` raises.
    """
    return _Reading(files, extents, use).run(progress, patience_s)


class _Reading:
    def __init__(
        self, files: Sequence[Path], extents: Sequence[S], use: Callable[[S, Blocks], R]
    ) -> None:
        self._extents = extents
        self._use = use
        self._results: list[R | None] = [None] * len(extents)
        # As they lie in the files: neighbours are read by several threads at about the same time.
        order = sorted(range(len(extents)), key=lambda i: (extents[i].shard, extents[i].offset))
        self._next = iter(order)
        self._lock = threading.Lock()
        self._done = 0
        self._at: dict[int, str] = {}  # by thread: what it reads
        self._error: BaseException | None = None
        self._stop = False
        self._paths = files
        # By shard: open while extents of it are left, so never many at once.
        self._files: dict[int, _File] = {}
        self._left = Counter(extent.shard for extent in extents)

    def run(self, progress: Callable[[int], None] | None, patience_s: float) -> list[R]:
        # Daemons: a read that never ends must not keep the process.
        count = min(THREADS, max(1, len(self._extents)))
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            self._watch(threads, progress, patience_s)
        except BaseException:
            self._stop = True
            raise  # the threads end when their reads do
        if self._error is not None:
            raise self._error
        return self._results  # type: ignore[return-value]

    def _watch(
        self,
        threads: Sequence[threading.Thread],
        progress: Callable[[int], None] | None,
        patience_s: float,
    ) -> None:
        seen, since = 0, time.monotonic()
        for thread in threads:
            while thread.is_alive():
                thread.join(_LOOK_S)
                done = self._done
                if progress is not None and done != seen:
                    progress(done)
                if done != seen or not thread.is_alive():
                    seen, since = done, time.monotonic()
                if time.monotonic() - since > patience_s:
                    where = ", ".join(list(self._at.values())[:1])
                    raise TimeoutError(
                        f"nothing was read for {patience_s:g} s: {where}. Is the drive healthy?"
                    )
        if progress is not None:
            progress(self._done)

    def _work(self) -> None:
        buffer = mmap.mmap(-1, BLOCK_BYTES)  # aligned to pages
        try:
            while not self._stop:
                with self._lock:
                    index = next(self._next, None)
                if index is None:
                    break
                extent = self._extents[index]
                file = self._open(extent.shard)
                self._results[index] = self._use(extent, self._blocks(file, extent, buffer))
                self._done_with(extent.shard, file)
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._stop = True
        self._at.pop(threading.get_ident(), None)

    def _open(self, shard: int) -> _File:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = _File(self._paths[shard])
            return self._files[shard]

    def _done_with(self, shard: int, file: _File) -> None:
        with self._lock:
            self._left[shard] -= 1
            if self._left[shard]:
                return
            del self._files[shard]
        file.check_unchanged()
        file.close()

    def _blocks(self, file: _File, extent: FileExtent, buffer: mmap.mmap) -> Blocks:
        offset, end = extent.offset, extent.offset + extent.nbytes
        while offset < end:
            if self._stop:
                raise InterruptedError("another thread's read has failed")
            self._at[threading.get_ident()] = f"{file.path}, offset {offset}"
            block = file.read(offset, end - offset, buffer)
            yield block
            offset += len(block)
            with self._lock:
                self._done += len(block)


class _File:
    """A file open for direct reads, else for buffered ones. Thread-safe. Closed at the latest when
    nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._direct: int | None = None
        self._buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._status = self._identity()
            self._alignment = _engine.direct_alignment(str(path))
            try:
                # By way of the open descriptor it is the same file, whatever happens to the path.
                again = f"/proc/self/fd/{self._buffered}"
                self._direct = os.open(again, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError:
                self._refuse_direct()
        except BaseException:
            self.close()
            raise
        self._reads_direct = self._direct is not None

    def close(self) -> None:
        for fd in (self._direct, self._buffered):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._direct, self._buffered = None, -1

    def __del__(self) -> None:
        if self.__dict__.get("_buffered", -1) >= 0:
            self.close()

    def check_unchanged(self) -> None:
        if self._identity() != self._status:
            raise OSError(
                f"{self.path} was changed while it was read; run again when nothing writes it"
            )

    def read(self, offset: int, nbytes: int, buffer: mmap.mmap) -> memoryview:
        """At least one of the bytes from `offset`, as many as fit into the buffer."""
        skipped = offset % self._alignment
        wanted = min(nbytes, len(buffer) - skipped)
        got = 0
        try:
            if self._reads_direct:
                got = self._read_direct(offset - skipped, skipped + wanted, buffer) - skipped
            if not self._reads_direct:
                skipped, wanted = 0, min(nbytes, len(buffer))
                got = self._read_buffered(offset, wanted, buffer)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: {self.path}, offset {offset}") from error
        if got <= 0:
            raise OSError(
                f"{self.path} ends at offset {offset}, where {nbytes} bytes should follow"
            )
        return memoryview(buffer)[skipped : skipped + min(got, wanted)]

    def _read_direct(self, offset: int, nbytes: int, buffer: mmap.mmap) -> int:
        assert self._direct is not None
        size = min(-(-nbytes // self._alignment) * self._alignment, len(buffer))
        try:
            return os.preadv(self._direct, [memoryview(buffer)[:size]], offset)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._refuse_direct()
            self._reads_direct = False
            return 0

    def _refuse_direct(self) -> None:
        # Without read-ahead, what is found in the cache was not put there by the read before.
        os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_RANDOM)

    def _read_buffered(self, offset: int, nbytes: int, buffer: mmap.mmap) -> int:
        stays = _engine.in_page_cache(self._buffered, offset, nbytes)
        got = os.preadv(self._buffered, [memoryview(buffer)[:nbytes]], offset)
        if not stays:
            os.posix_fadvise(self._buffered, offset, nbytes, os.POSIX_FADV_DONTNEED)
        return got

    def _identity(self) -> tuple[int, ...]:
        status = os.fstat(self._buffered)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

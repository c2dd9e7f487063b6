"""Hostile surroundings for one process: system calls that are refused, limits, mounts, and what of
a file lies in the page cache.

What changes a process for good belongs into one of its own: `in_a_child` forks it from a server in
which torch is imported and nothing runs.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from waits import LIMIT_S

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]

# -- children --------------------------------------------------------------------------------------


class NotHereError(Exception):
    """This machine does not allow what the test needs; the message says what."""


def _report(
    pipe: Connection, log: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 2)
    os.environ["XDG_CACHE_HOME"] = str(Path(log).parent)
    try:
        pipe.send(("done", function(*arguments)))
    except NotHereError as reason:
        pipe.send(("skip", str(reason)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def in_a_child(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What `function(*arguments)` returns in a process of its own, and what that logged.

    `function` stands at the top of a module; it skips the test by a NotHereError.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "wsm_ext"])
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        child = context.Process(target=_report, args=(there, str(log), function, arguments))
        child.start()
        there.close()
        try:
            assert here.poll(LIMIT_S), f"no answer within {LIMIT_S} s: {log.read_text()}"
            how, what = here.recv()
        except EOFError:
            child.join(LIMIT_S)
            pytest.fail(f"the child ended with {child.exitcode}: {log.read_text()}")
        finally:
            child.join(LIMIT_S)
            if child.is_alive():
                child.kill()
        logged = log.read_text()
    if how == "skip":
        pytest.skip(what)
    assert how == "done", f"{what}\n{logged}"
    assert child.exitcode == 0, logged
    return what, logged


def run_python(*words: object, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    """An interpreter of its own, which finds what this one does. If it hangs, it says where."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-X", "faulthandler", *map(str, words)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, said = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # which faulthandler answers with what runs
        out, said = process.communicate()
        pytest.fail(f"no end after {limit_s} s: {command}\n{out}\n{said}")
    return subprocess.CompletedProcess(command, process.returncode, out, said)


# -- system calls that fail ------------------------------------------------------------------------

_NUMBERS = {
    "x86_64": {"pread64": 17, "mincore": 27, "openat": 257, "statx": 332},
    "aarch64": {"pread64": 67, "mincore": 232, "openat": 56, "statx": 291},
}
_NUMBERS_ANYWHERE = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "cachestat": 451,
}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVS, _FILTER_OF_ALL_THREADS = 38, 1


def forbid(
    call: str,
    error: int,
    *,
    flag: tuple[int, int] | None = None,
    where: Mapping[int, int] | None = None,
) -> None:
    """Makes a system call of this process fail with `error`, in all of its threads, for good.

    Where given, only if argument `flag[0]` has a bit of `flag[1]`, and the arguments have the
    values in `where`, by index.
    """
    machine = os.uname().machine
    number = (_NUMBERS.get(machine, {}) | _NUMBERS_ANYWHERE).get(call)
    if number is None:
        raise NotHereError(f"the number of {call} on {machine} is not known here")
    tests = [(_EQUAL, 0, number)]
    tests += [(_EQUAL, 16 + 8 * index, value) for index, value in (where or {}).items()]
    if flag is not None:
        tests.append((_ANY_BIT, 16 + 8 * flag[0], flag[1]))
    program = []
    for left, (kind, offset, value) in zip(range(len(tests), 0, -1), tests, strict=True):
        program.append(struct.pack("HBBI", _LOAD, 0, 0, offset))
        # To the last instruction but one where it fails: two for each test that is left.
        program.append(struct.pack("HBBI", kind, 0, 2 * (left - 1) + 1, value))
    program.append(struct.pack("HBBI", _RETURN, 0, 0, _ERRNO | error))
    program.append(struct.pack("HBBI", _RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    filter_ = struct.pack("H6xP", len(program), ctypes.addressof(code))
    if _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise NotHereError("this process may not give up new privileges")
    if _libc.syscall(_SECCOMP[machine], 1, _FILTER_OF_ALL_THREADS, filter_) != 0:
        raise NotHereError(f"seccomp filters: {os.strerror(ctypes.get_errno())}")


def lock_no_memory() -> None:
    """RLIMIT_MEMLOCK of zero, without the capability that overrides it."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    ipc_lock = 1 << 14
    head = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    assert _libc.capget(head, data) == 0
    sets = list(struct.unpack("6I", data.raw))
    sets[0] &= ~ipc_lock
    assert _libc.capset(head, struct.pack("6I", *sets)) == 0


# -- mounts ----------------------------------------------------------------------------------------

_NEW_MOUNTS, _RECURSIVE, _PRIVATE, _BIND = 0x20000, 0x4000, 0x40000, 0x1000


def own_mounts() -> None:
    """From here on this process sees mounts of its own, which end with it."""
    if _libc.unshare(_NEW_MOUNTS) != 0:
        raise NotHereError(f"mounts of its own: {os.strerror(ctypes.get_errno())}")
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)


def cover(path: str, text: str) -> None:
    """Everyone who reads `path` in this process reads `text`."""
    own_mounts()
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(text)
        file.flush()
        _mount(file.name, path, None, _BIND)


def mount_loop(
    folder: Path, make: tuple[str, ...], options: str = "loop", sector_bytes: int = 512
) -> Path:
    """A file system of its own in a file of `folder`, made by `make` and mounted for this
    process."""
    own_mounts()
    image, place = folder / "image", folder / "mounted"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(512 << 20)  # sparse; mkfs.xfs wants 300 MiB
    device = str(image)
    if sector_bytes != 512:
        device = _command("losetup", "-f", "--show", "-b", str(sector_bytes), device).strip()
    try:
        _command(*make, device)
        _command("mount", "-o", options, device, str(place))
    finally:
        if sector_bytes != 512:
            _command("losetup", "-d", device)  # as soon as nobody uses it
    return place


def mount_overlay(folder: Path) -> Path:
    own_mounts()
    for name in ("lower", "upper", "work", "mounted"):
        (folder / name).mkdir()
    layers = ",".join(f"{name}dir={folder / name}" for name in ("lower", "upper", "work"))
    _command("mount", "-t", "overlay", "overlay", "-o", layers, str(folder / "mounted"))
    return folder / "mounted"


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    if _libc.mount(*texts, ctypes.c_ulong(flags), None) != 0:
        raise NotHereError(f"mounting {target}: {os.strerror(ctypes.get_errno())}")


def _command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
    except FileNotFoundError:
        raise NotHereError(f"{words[0]} is not installed") from None
    if done.returncode != 0:
        raise NotHereError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


# -- the page cache --------------------------------------------------------------------------------


def cached_pages(path: Path) -> list[bool]:
    """For each page of the file whether it lies in the page cache. Brings none in."""
    size = path.stat().st_size
    told = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    with open(path, "rb") as file:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    try:
        assert _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), told) == 0
    finally:
        _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return [bool(page & 1) for page in told.raw]


def drop(path: Path) -> None:
    """Takes the file out of the page cache; skips the test where that cannot be done."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(cached_pages(path)):
        raise NotHereError(f"{path} cannot be dropped from the page cache")


def warm(path: Path, begin: int = 0, end: int | None = None) -> None:
    """Brings the range into the page cache, and nothing beside it."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), (end or path.stat().st_size) - begin, begin)

"""The ladder of readers, from io_uring with direct reads down to threads over the page cache: each
step that is refused is found, said once and remembered, and the bits stay right.

Each case runs in a process of its own (`surroundings.py`), whose system calls, limits or mounts are
made as hostile as the case says.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens
from surroundings import (
    NotHereError,
    cached_pages,
    cover,
    drop,
    forbid,
    in_a_child,
    lock_no_memory,
    mount_loop,
    mount_overlay,
)
from torch import nn

import wsm_ext as wsm
from wsm_ext import _engine

MIB = 1 << 20
LAYERS = 6
# All layers come from the disk in every pass.
STREAMED: dict[str, Any] = {"device": "cpu", "device_memory": 24 * MIB, "host_memory": 8 * MIB}
STREAMING = {
    "home_bytes": 0,
    "chunk_mb": 1.0,
    "staging_mb": 8,
    "poison": True,
    "measure": False,
}

Change = Callable[[], object]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
needs_uring = pytest.mark.skipif(not _engine.built_with_uring, reason="built without liburing")
# On more cores, threads are what is chosen unless the ring is asked for.
CHOOSES_URING = (os.cpu_count() or 1) < 8


@functools.cache
def resident() -> Net:
    return make_net(layers=LAYERS)


@torch.inference_mode()
def result(net: nn.Module) -> torch.Tensor:
    return net(tokens())


def open_net(folder: Path | None, config: dict[str, Any]) -> wsm.StreamedModule:
    """Streamed from the files of the folder, which the page cache does not have; None: from RAM."""
    net = make_net(layers=LAYERS)
    if folder is not None:
        for file in folder.iterdir():
            drop(file)
        net = on_meta(net, layers=LAYERS)
    return wsm.stream(net, folder, **STREAMED, config={**STREAMING, **config})


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A checkpoint on a drive: the usual folder for temporary files may be a tmpfs."""
    place = Path(tempfile.mkdtemp(prefix="wsm-test-", dir=os.environ.get("TMPDIR") or "/var/tmp"))
    yield save(make_net(layers=LAYERS), place / "net", shards=2)
    shutil.rmtree(place)


def passes(folder: Path, config: dict[str, Any], changes: list[Change], midway: list[Change]):
    """Two passes after `changes`, and two more after `midway`; all bits right. What was read how,
    the warnings, and the share of the files that is left in the page cache."""
    for change in changes:
        change()
    expected = result(resident())
    with open_net(folder, config) as streamed:
        for step in ([], midway):
            for change in step:
                change()
            for _ in range(2):
                assert torch.equal(result(streamed), expected)
        stats = streamed.stats()
    pages = [page for file in sorted(folder.iterdir()) for page in cached_pages(file)]
    return list(stats["readers"].values()), stats["warnings"], sum(pages) / len(pages)


def refused(folder: Path, config: dict[str, Any]) -> str:
    """The error of opening."""
    with pytest.raises((OSError, wsm.EngineError)) as error:
        open_net(folder, config)
    return f"{error.type.__name__}: {error.value}"


def passes_and_refused(folder: Path, change: Change, choice: dict[str, Any]):
    """What `passes` finds after the change, and the error where the refused is asked for."""
    found = passes(folder, {}, [change], [])
    return *found, refused(folder, choice)


def lines(logged: str) -> list[str]:
    return [line for line in logged.splitlines() if line.startswith("[WSM]")]


# -- io_uring --------------------------------------------------------------------------------------

PERM = "Operation not permitted (errno 1)"


def turn_the_sysctl() -> None:
    """What `kernel.io_uring_disabled` = 2 does, to this process alone."""
    cover("/proc/sys/kernel/io_uring_disabled", "2\n")
    forbid("io_uring_setup", errno.EPERM)


RING_REFUSED: dict[str, tuple[Change, str]] = {
    "seccomp, EPERM": (
        partial(forbid, "io_uring_setup", errno.EPERM),
        f"io_uring_setup: {PERM}; a seccomp filter, as containers have, is the likely cause",
    ),
    "seccomp, ENOSYS": (
        partial(forbid, "io_uring_setup", errno.ENOSYS),
        "io_uring_setup: Function not implemented (errno 38); this kernel or sandbox has no"
        " io_uring",
    ),
    "the sysctl": (
        turn_the_sysctl,
        f"io_uring_setup: {PERM}; the sysctl kernel.io_uring_disabled is 2",
    ),
    "locked memory": (
        partial(forbid, "io_uring_setup", errno.ENOMEM),
        "io_uring_setup: Cannot allocate memory (errno 12); raise the limit on locked memory",
    ),
    "the first read": (
        partial(forbid, "io_uring_enter", errno.EPERM),
        f"io_uring_enter: {PERM}; a seccomp filter",
    ),
    "registration": (
        partial(forbid, "io_uring_register", errno.EPERM),
        f"io_uring_register_eventfd: {PERM}; a seccomp filter",
    ),
}


@needs_uring
@pytest.mark.parametrize("case", RING_REFUSED)
def test_without_a_ring_threads_read(case: str, folder: Path) -> None:
    change, why = RING_REFUSED[case]
    choice = {"reader": "uring"}
    (readers, warnings, _, error), logged = in_a_child(passes_and_refused, folder, change, choice)
    assert [(r["reader"], r["mode"]) for r in readers] == [("pread", "direct")] * 2
    assert warnings == []
    assert error.startswith("EngineError: io_uring was asked for and cannot be used: " + why)
    if CHOOSES_URING:
        assert all(why in r["why"] for r in readers), readers
        (line,) = lines(logged)
        assert line.startswith(f"[WSM] reading with pread: {why}")
    else:
        assert lines(logged) == []


@needs_uring
def test_no_memory_need_be_locked_for_a_ring(folder: Path) -> None:
    """Nothing is registered with it but the eventfd. (Older kernels count the ring itself.)"""
    (readers, *_), logged = in_a_child(passes, folder, {}, [lock_no_memory], [])
    assert [r["mode"] for r in readers] == ["direct"] * 2
    for line in lines(logged):
        assert line.startswith("[WSM] reading with pread: io_uring_setup: Cannot allocate memory")


@needs_uring
def test_a_ring_that_is_refused_later_gives_way_to_threads(folder: Path) -> None:
    midway = [partial(forbid, "io_uring_enter", errno.EPERM)]
    (readers, *_), logged = in_a_child(passes, folder, {"reader": "uring"}, [], midway)
    for reader in readers:
        assert (reader["reader"], reader["mode"]) == ("pread", "direct")
        assert f"io_uring failed: {PERM}" in reader["why"]
    assert lines(logged) == [f"[WSM] reading with pread: io_uring failed: {PERM}"]


# -- direct reads ----------------------------------------------------------------------------------


def refuse_the_first_read(folder: Path) -> None:
    """That by which `Shard` tries out whether a file can be read directly."""
    (alignment,) = {_engine.direct_alignment(str(file)) for file in folder.iterdir()}
    forbid("pread64", errno.EINVAL, where={2: alignment, 3: 0})


def refuse_open(error: int) -> None:
    forbid("openat", error, flag=(2, os.O_DIRECT))


DIRECT_REFUSED: dict[str, tuple[Callable[[Path], Change], str]] = {
    "open, EINVAL": (
        lambda _: partial(refuse_open, errno.EINVAL),
        "O_DIRECT refused at open: Invalid argument (errno 22)",
    ),
    "open, EPERM": (
        lambda _: partial(refuse_open, errno.EPERM),
        f"O_DIRECT refused at open: {PERM}",
    ),
    "the first read": (
        lambda folder: partial(refuse_the_first_read, folder),
        "O_DIRECT refused at the first read: Invalid argument (errno 22)",
    ),
}


@pytest.mark.parametrize("case", DIRECT_REFUSED)
def test_without_direct_reads_the_page_cache_is_used_and_left_as_it_was(
    case: str, folder: Path
) -> None:
    change, why = DIRECT_REFUSED[case]
    choice = {"direct": "on"}
    (readers, warnings, left, error), logged = in_a_child(
        passes_and_refused, folder, change(folder), choice
    )
    assert [(r["reader"], r["mode"], r["why"]) for r in readers] == [("pread", "buffered", why)] * 2
    assert left < 0.02
    first = folder / "model-00001-of-00002.safetensors"
    assert lines(logged) == [
        f"[WSM] no direct reads of {first} and of 1 more files: {why}; reading through the page"
        " cache, and dropping from it what was not there"
    ]
    assert warnings == []
    assert error.startswith(f"OSError: direct reads of {first} are required, but cannot be done: ")
    assert f"{why}; let them be chosen automatically" in error


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_without_statx_pages_are_the_alignment(error: int, folder: Path) -> None:
    (readers, *_), logged = in_a_child(
        passes, folder, {"reader": "pread"}, [partial(forbid, "statx", error)], []
    )
    for reader in readers:
        assert reader["mode"] == "direct"
        assert f"O_DIRECT, alignment {os.sysconf('SC_PAGESIZE')}" in reader["why"]
    assert lines(logged) == []


# -- file systems ----------------------------------------------------------------------------------


def passes_on(mount: Callable[[Path], Path], place: Path):
    """The same on another file system."""
    return passes(save(resident(), mount(place) / "net", shards=2), {}, [], [])


def ext4(block_bytes: int, sector_bytes: int, options: str = "loop") -> Callable[[Path], Path]:
    make = ("mkfs.ext4", "-q", "-b", str(block_bytes))
    if sector_bytes != 512:
        options = "defaults"
    return partial(mount_loop, make=make, options=options, sector_bytes=sector_bytes)


FILE_SYSTEMS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "overlay": (mount_overlay, r"O_DIRECT, alignment \d+"),
    "ext4, blocks of 1 KiB": (ext4(1024, 512), r"O_DIRECT, alignment 512\b"),
    "ext4, sectors of 4 KiB": (ext4(4096, 4096), r"O_DIRECT, alignment 4096\b"),
    "ext4 that journals data": (
        ext4(4096, 512, "loop,data=journal"),
        "this file system does no direct reads of it$",
    ),
    "xfs": (partial(mount_loop, make=("mkfs.xfs", "-q")), r"O_DIRECT, alignment \d+"),
    "btrfs": (partial(mount_loop, make=("mkfs.btrfs", "-q")), r"O_DIRECT, alignment \d+"),
}


@pytest.mark.parametrize("case", FILE_SYSTEMS)
def test_other_file_systems(case: str, folder: Path) -> None:
    mount, why = FILE_SYSTEMS[case]
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        (readers, _, left), logged = in_a_child(passes_on, mount, Path(place))
    mode = "direct" if why.startswith("O_DIRECT") else "buffered"
    for found in readers:
        assert found["mode"] == mode
        assert re.match(why, found["why"]), found
    assert left < 0.02
    assert len(lines(logged)) == (mode == "buffered")


def test_a_tmpfs_is_read_as_memory_and_says_nothing() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        (readers, *_), logged = in_a_child(tmpfs_passes, Path(place), {})
    assert [(r["reader"], r["mode"], r["why"]) for r in readers] == [
        ("pread", "buffered", "tmpfs")
    ] * 2
    assert lines(logged) == []


def tmpfs_passes(place: Path, config: dict[str, Any]):
    saved = save(resident(), place, shards=2)
    with wsm.stream(
        on_meta(resident(), layers=LAYERS), saved, **STREAMED, config={**STREAMING, **config}
    ) as streamed:
        assert torch.equal(result(streamed), result(resident()))
        stats = streamed.stats()
    return list(stats["readers"].values()), stats["warnings"]


# -- choices ---------------------------------------------------------------------------------------


CHOICES: list[tuple[dict[str, str], str, str]] = [
    ({"reader": "uring"}, "uring", "direct"),
    ({"reader": "uring", "direct": "on"}, "uring", "direct"),
    ({"reader": "pread"}, "pread", "direct"),
    ({"reader": "pread", "direct": "on"}, "pread", "direct"),
    ({"reader": "pread", "direct": "off"}, "pread", "buffered"),
    ({"direct": "off"}, "pread", "buffered"),
]


def passes_by_choice(folder: Path, choices: list[dict[str, str]]):
    return [passes(folder, config, [], []) for config in choices]


def test_a_choice_is_kept_to(folder: Path) -> None:
    choices = [c for c in CHOICES if c[1] != "uring" or _engine.built_with_uring]
    found, logged = in_a_child(passes_by_choice, folder, [config for config, *_ in choices])
    for (readers, warnings, left), (_, reader, mode) in zip(found, choices, strict=True):
        assert [(r["reader"], r["mode"]) for r in readers] == [(reader, mode)] * 2
        assert left < 0.02
        assert warnings == []
    assert lines(logged) == []


@needs_uring
def test_a_ring_over_a_tmpfs_is_a_warning() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        (_, warnings), logged = in_a_child(tmpfs_passes, Path(place), {"reader": "uring"})
    (warning,) = warnings
    assert re.search(r"'uring' \(WSM_READER\) has no effect.* is read by threads: tmpfs", warning)
    assert lines(logged) == [f"[WSM] {warning}"]


def ram_passes(choices: list[dict[str, Any]]) -> list[list[str]]:
    warnings = []
    for config in choices:
        with open_net(None, config) as streamed:
            assert torch.equal(result(streamed), result(resident()))
            warnings.append(streamed.stats()["warnings"])
    return warnings


def test_a_choice_without_effect_on_weights_in_ram_is_a_warning() -> None:
    choices = [{"direct": "on"}, {"direct": "off", "reader": "pread"}]
    if _engine.built_with_uring:
        choices.append({"reader": "uring"})
    (direct, neither, *ring), logged = in_a_child(ram_passes, choices)
    assert direct == ["direct reads (WSM_DIRECT=1) are not done: the weights come from RAM"]
    assert neither == []
    text = "reader 'uring' (WSM_READER) has no effect: the weights come from RAM"
    assert ring in ([], [[text]])
    assert lines(logged) == [f"[WSM] {warning}" for (warning,) in (direct, *ring)]


def opened_often(folder: Path, change: Change) -> None:
    """Streams, a resize, and the measuring of the drive: all meet the same refusal."""
    change()
    for measure in (True, False):
        with open_net(folder, {"measure": measure}) as streamed:
            streamed.resize(host_memory=16 * MIB)
            assert torch.equal(result(streamed), result(resident()))


def test_a_refusal_is_said_once_however_often_it_is_met(folder: Path) -> None:
    _, logged = in_a_child(opened_often, folder, partial(forbid, "io_uring_setup", errno.EPERM))
    assert len(lines(logged)) == (CHOOSES_URING and _engine.built_with_uring)
    _, logged = in_a_child(opened_often, folder, partial(refuse_open, errno.EINVAL))
    assert len(lines(logged)) == 1


def test_a_machine_that_allows_nothing_skips_with_the_reason() -> None:
    with pytest.raises(NotHereError, match="no-such-program is not installed"):
        mount_loop.__globals__["_command"]("no-such-program")

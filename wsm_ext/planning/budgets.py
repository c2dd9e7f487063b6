"""How much memory "auto" may take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from ..sizes import parse_bytes

# With device="cpu" both budgets are RAM: what stays on the "device" needs no copy, so it gets more.
CPU_DEVICE_SHARE = 0.85
_GIB = 1 << 30
_MEASURING_BYTES = 256 << 20  # copies and reads that are timed
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def host_available(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes of RAM that can be taken: the smallest headroom of the machine and of the control
    groups around this process, less a reserve for everyone else."""
    available = min([_mem_available(proc), *_group_headrooms(proc, cgroups)])
    available = max(0, available)
    return available - min(max(_GIB, available // 10), available // 2)


def preload_room(cpu: bool, host_memory: int | str) -> int:
    """Bytes that may be read before there is a plan: of the budget, and of what is free now, less
    what measuring takes meanwhile. On a CPU, RAM is for what stays as well."""
    room = host_available()
    if cpu and host_memory == "auto":
        room = int(room * (1 - CPU_DEVICE_SHARE))
    if host_memory != "auto":
        room = min(room, parse_bytes(host_memory, "host_memory"))
    return max(0, room - _MEASURING_BYTES)


def device_available(device: torch.device, guard_bytes: int) -> int:
    """Bytes of device memory that can be taken, `guard_bytes` left free. For the CPU: of RAM."""
    if device.type == "cpu":
        return host_available()
    if device.type != "cuda":
        raise ValueError(f"device {device} is neither a CUDA device nor the CPU")
    free, _ = torch.cuda.mem_get_info(device)
    # What torch's allocator holds without use, it hands out again.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, free + unused - guard_bytes)


def _mem_available(proc: Path) -> int:
    try:
        with open(proc / "meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError) as error:
        raise RuntimeError(
            f"{proc / 'meminfo'} does not tell the memory that is free ({error}): give host_memory"
            " as a size"
        ) from error
    raise RuntimeError(f"{proc / 'meminfo'} has no MemAvailable: give host_memory as a size")


def _group_headrooms(proc: Path, cgroups: Path) -> Iterator[int]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            for root in (cgroups, cgroups / "unified"):  # the second beside version 1
                for folder in _upwards(root, group):
                    yield from _headroom_v2(folder)
        elif "memory" in controllers.split(","):
            for folder in _upwards(cgroups / "memory", group):
                yield from _headroom_v1(folder)


def _upwards(root: Path, group: str) -> Iterator[Path]:
    """The group's folder and all above it, to the root. In a container the path may be the host's
    and lead nowhere here, while the root is the container's own group."""
    parts = [part for part in PurePosixPath(group).parts if part != "/"]
    if ".." in parts:  # outside of this process's view
        parts = []
    for length in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:length])


def _headroom_v2(folder: Path) -> Iterator[int]:
    used = _read_number(folder / "memory.current")
    limits = [_read_number(folder / name) for name in ("memory.max", "memory.high")]
    for limit in limits:
        if limit is not None and used is not None:
            yield limit - used + _file_pages(folder, "inactive_file", "active_file")


def _headroom_v1(folder: Path) -> Iterator[int]:
    used = _read_number(folder / "memory.usage_in_bytes")
    limit = _read_number(folder / "memory.limit_in_bytes")
    if limit is not None and used is not None:
        yield limit - used + _file_pages(folder, "total_inactive_file", "total_active_file")


def _file_pages(folder: Path, *names: str) -> int:
    """Page cache that the kernel gives up before it refuses memory."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = [line.split() for line in lines]
    return sum(int(f[1]) for f in fields if len(f) == 2 and f[0] in names and f[1].isdigit())


def _read_number(path: Path) -> int | None:
    """None if there is no such file, or no limit ("max")."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None

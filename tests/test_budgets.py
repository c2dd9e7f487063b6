"""What "auto" takes, by made-up /proc and control groups."""

from pathlib import Path

import pytest
import torch

from wsm_ext.planning.budgets import device_available, host_available

GIB = 1 << 30


class Machine:
    def __init__(self, folder: Path):
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroups.mkdir()
        self.meminfo(100 * GIB)

    def meminfo(self, available: int) -> None:
        (self.proc / "meminfo").write_text(
            f"MemTotal:       {200 * GIB // 1024} kB\nMemFree:        5 kB\n"
            f"MemAvailable:   {available // 1024} kB\n"
        )

    def inside(self, text: str) -> None:
        (self.proc / "self" / "cgroup").write_text(text)

    def group(self, path: str, stat: dict | None = None, **files: object) -> None:
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name.replace("__", ".", 1)).write_text(f"{value}\n")
        if stat is not None:
            lines = "".join(f"{key} {value}\n" for key, value in stat.items())
            (folder / "memory.stat").write_text(lines)

    def available(self) -> int:
        return host_available(self.proc, self.cgroups)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def less_reserve(size: int) -> int:
    return size - max(GIB, size // 10)


@pytest.mark.parametrize(
    ("available", "taken"),
    [
        (100 * GIB, 90 * GIB),
        (10 * GIB, 9 * GIB),
        (5 * GIB, 4 * GIB),
        (2 * GIB, GIB),
        (GIB, GIB // 2),
        (0, 0),
    ],
)
def test_the_reserve(machine, available, taken):
    machine.meminfo(available)
    assert machine.available() == taken


def test_the_smaller_of_machine_and_group(machine):
    machine.inside("0::/job\n")
    machine.group("job", memory__max=40 * GIB, memory__current=10 * GIB)
    assert machine.available() == less_reserve(30 * GIB)
    machine.meminfo(20 * GIB)
    assert machine.available() == less_reserve(20 * GIB)


def test_every_group_above_counts(machine):
    machine.inside("0::/pod/job/step\n")
    machine.group("pod/job/step", memory__max="max", memory__current=GIB)
    machine.group("pod/job", memory__max=50 * GIB, memory__current=GIB)
    machine.group("pod", memory__max=30 * GIB, memory__current=5 * GIB)
    assert machine.available() == less_reserve(25 * GIB)
    machine.group("", memory__max=10 * GIB, memory__current=6 * GIB)
    assert machine.available() == less_reserve(4 * GIB)


def test_file_pages_are_free(machine):
    machine.inside("0::/job\n")
    stat = {"anon": GIB, "inactive_file": 3 * GIB, "active_file": 2 * GIB, "slab": GIB}
    machine.group("job", stat, memory__max=20 * GIB, memory__current=18 * GIB)
    assert machine.available() == less_reserve(7 * GIB)


def test_the_limit_at_which_the_kernel_slows_the_group_counts(machine):
    machine.inside("0::/job\n")
    machine.group("job", memory__max=40 * GIB, memory__high=20 * GIB, memory__current=0)
    assert machine.available() == less_reserve(20 * GIB)


def test_a_group_over_its_limit_leaves_nothing(machine):
    machine.inside("0::/job\n")
    machine.group("job", memory__max=GIB, memory__current=2 * GIB)
    assert machine.available() == 0


@pytest.mark.parametrize("path", ["/docker/0123", "/", "/../other"])
def test_in_a_container_the_root_is_the_group(machine, path):
    machine.inside(f"0::{path}\n")
    machine.group("", memory__max=8 * GIB, memory__current=0)
    outside = machine.cgroups.parent / "other"
    outside.mkdir()
    (outside / "memory.max").write_text("1")
    (outside / "memory.current").write_text("0")
    assert machine.available() == less_reserve(8 * GIB)


def test_version_1(machine):
    machine.inside("3:cpu,cpuacct:/\n4:cpuset,memory:/docker/job\n0::/\n")
    stat = {"inactive_file": GIB, "total_inactive_file": 2 * GIB, "total_active_file": 0}
    usage = {"memory__usage_in_bytes": 10 * GIB}
    machine.group("memory/docker/job", stat, memory__limit_in_bytes=20 * GIB, **usage)
    machine.group("memory", memory__limit_in_bytes=0x7FFFFFFFFFFFF000, **usage)
    assert machine.available() == less_reserve(12 * GIB)
    machine.group("memory/docker", memory__limit_in_bytes=15 * GIB, **usage)
    assert machine.available() == less_reserve(5 * GIB)


def test_version_2_beside_version_1(machine):
    machine.inside("4:memory:/\n0::/job\n")
    machine.group("unified/job", memory__max=8 * GIB, memory__current=0)
    assert machine.available() == less_reserve(8 * GIB)


def test_groups_that_say_nothing_limit_nothing(machine):
    machine.inside("0::/job\n1:name=systemd:/job\n\n")
    machine.group("job", memory__max="max", memory__current=GIB)
    assert machine.available() == 90 * GIB


def test_meminfo_that_does_not_tell_is_an_error(machine):
    (machine.proc / "meminfo").write_text("MemTotal: 5 kB\n")
    with pytest.raises(RuntimeError, match="no MemAvailable: give host_memory as a size"):
        machine.available()
    (machine.proc / "meminfo").unlink()
    with pytest.raises(RuntimeError, match=r"meminfo does not tell.*give host_memory as a size"):
        machine.available()


def test_this_machine_has_some_memory():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) for line in lines if "MemTotal" in line)
    assert 0 < host_available() < total * 1024


# Devices


@pytest.fixture
def cuda(monkeypatch):
    asked = []

    def answers(value):
        return lambda device: asked.append(device) or value

    monkeypatch.setattr(torch.cuda, "mem_get_info", answers((10 * GIB, 80 * GIB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", answers(5 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", answers(3 * GIB))
    return asked


def test_what_torch_holds_unused_counts_as_free(cuda):
    device = torch.device("cuda", 1)
    assert device_available(device, GIB) == (10 + 2 - 1) * GIB
    assert cuda == [device] * 3


def test_a_guard_larger_than_what_is_free_leaves_nothing(cuda):
    assert device_available(torch.device("cuda"), 13 * GIB) == 0


def test_the_cpu_has_what_the_host_has(monkeypatch):
    monkeypatch.setattr("wsm_ext.planning.budgets.host_available", lambda: 77)
    assert device_available(torch.device("cpu"), 10) == 77


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="meta is neither a CUDA device nor the CPU"):
        device_available(torch.device("meta"), 0)

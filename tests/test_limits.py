"""Streams where the system gives less: few descriptors, little address space, no locked memory, a
control group's memory limit. A clear error or a smaller plan, and nothing is left behind.

Each scenario is a function of this file that runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import make_net, on_meta, save
from surroundings import run_python
from test_processes import MIB, STREAMED, held, open_net, resident, result
from torch import nn

import wsm_ext as wsm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(resident(), tmp_path_factory.mktemp("net"), shards=2)


def run(scenario: Callable[..., None], *arguments: object) -> subprocess.CompletedProcess[str]:
    code = f"import sys, test_limits as t\nt.{scenario.__name__}(*sys.argv[1:])"
    return run_python("-c", code, *arguments)


def in_a_process(scenario: Callable[..., None], *arguments: object) -> None:
    done = run(scenario, *arguments)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


# -- descriptors -----------------------------------------------------------------------------------


def with_few_descriptors(folder: str) -> None:
    expected = result(resident())

    def use() -> None:
        with open_net(Path(folder)) as streamed:
            assert torch.equal(result(streamed), expected)

    use()
    before = held()
    refused: list[str] = []
    for descriptors in range(before[0] - 2, before[0] + 60):
        try:
            with limited(resource.RLIMIT_NOFILE, descriptors):
                use()
        except OSError as error:
            refused.append(str(error))
        else:
            break
        assert held()[0] == before[0], descriptors
    else:
        raise AssertionError("60 descriptors are not enough")
    assert len(refused) > 5
    assert all("Too many open files" in text for text in refused), refused
    use()


def resize_with_few_descriptors(folder: str) -> None:
    """The resize fails, and leaves a module that is as it was before it was streamed."""
    before = held()
    streamed = open_net(Path(folder))
    module = streamed
    with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(OSError, match="Too many open files"):
        streamed.resize(device_memory=30 * MIB)
    assert not any("forward" in inner.__dict__ for inner in module.modules())
    assert all(parameter.is_meta for parameter in module.parameters())
    with wsm.stream(module, folder, **STREAMED) as again:
        assert torch.equal(result(again), result(resident()))
    del streamed
    assert held()[0] == before[0]


@pytest.mark.parametrize("scenario", [with_few_descriptors, resize_with_few_descriptors])
def test_few_descriptors(scenario: Callable[..., None], folder: Path) -> None:
    in_a_process(scenario, folder)


# -- address space ---------------------------------------------------------------------------------


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def with_little_address_space(folder: str) -> None:
    layers, step = 24, 8 * MIB  # 144 MiB, in shards of which each must be mapped
    net = make_net(layers=layers)
    expected = result(net)
    save(net, Path(folder), shards=6)
    net = on_meta(net, layers=layers)
    options: dict[str, Any] = {**STREAMED, "device_memory": 120 * MIB}
    options["config"] = {"chunk_mb": 1.0, "staging_mb": 8}

    def use() -> list[str]:
        with warnings.catch_warnings(), wsm.stream(net, folder, **options) as streamed:
            warnings.simplefilter("ignore")
            assert torch.equal(result(streamed), expected)
            memory = streamed.stats()["memory"]
            assert memory["device_bytes"] <= memory["device_budget_bytes"] <= 120 * MIB
            return streamed.plan.warnings

    warnings.simplefilter("ignore")
    assert use() == []
    refused: list[str] = []
    smaller = 0
    before = held()
    for spare in range(0, 40 * step, step):
        try:
            with limited(resource.RLIMIT_AS, address_space() + spare):
                warned = use()
        except (MemoryError, torch.OutOfMemoryError, wsm.EngineError) as error:
            refused.append(str(error))
        else:
            if not warned:
                break
            assert "planned again with" in warned[0]
            smaller += 1
        assert held()[0] == before[0], spare
    else:
        raise AssertionError("320 MiB are not enough")
    clear = ("no memory to read the header", "cannot map", "cannot start a thread", "CPUAllocator")
    assert refused
    assert all(any(words in text for words in clear) for text in refused), refused
    assert smaller > 0
    assert use() == []


def test_little_address_space(tmp_path: Path) -> None:
    in_a_process(with_little_address_space, tmp_path)


# -- locked memory ---------------------------------------------------------------------------------


def without_locked_memory(folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    with open_net(Path(folder)) as streamed:
        assert torch.equal(result(streamed), result(resident()))


def test_no_locked_memory(folder: Path) -> None:
    in_a_process(without_locked_memory, folder)


# -- control groups --------------------------------------------------------------------------------


GROUP_BYTES = 768 * MIB
WIDTH = 2048
DEPTH = 64  # of 16 MiB: 1 GiB


class Group:
    """A control group inside this process's own, of version 1 or 2."""

    def __init__(self) -> None:
        self.folder, self.version = _make_group()
        limit, peak = {
            1: ("memory.limit_in_bytes", "memory.max_usage_in_bytes"),
            2: ("memory.max", "memory.peak"),
        }[self.version]
        (self.folder / limit).write_text(str(GROUP_BYTES))
        if (swap := self.folder / "memory.swap.max").exists():
            swap.write_text("0")
        self._peak = self.folder / peak

    def peak_bytes(self) -> int | None:
        return int(self._peak.read_text()) if self._peak.exists() else None


def _make_group() -> tuple[Path, int]:
    root = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, own = line.split(":", 2)
        if "memory" in controllers.split(","):
            base, version, limit = root / "memory" / own[1:], 1, "memory.limit_in_bytes"
        elif number == "0":
            base, version, limit = root / own[1:], 2, "memory.max"
        else:
            continue
        # In version 2 a group that holds processes may have no groups with controllers inside.
        for parent in (base, base.parent)[:version]:
            folder = parent / f"wsm-test-{os.getpid()}"
            with contextlib.suppress(OSError):
                folder.mkdir()
                if os.access(folder / limit, os.W_OK):
                    return folder, version
                folder.rmdir()
    pytest.skip("no control group with a memory limit can be made here")


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    made.folder.rmdir()


def first_element(layer: int) -> float:
    return 2.0 ** (layer % 3 - 1)


def save_sparse(folder: Path) -> Path:
    """Layers of zeros, which take no room on the disk, but for their first element."""
    nbytes = WIDTH * WIDTH * 4
    header = json.dumps(
        {
            f"{index}.weight": {
                "dtype": "F32",
                "shape": [WIDTH, WIDTH],
                "data_offsets": [index * nbytes, (index + 1) * nbytes],
            }
            for index in range(DEPTH)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        begin = file.tell()
        for index in range(DEPTH):
            file.seek(begin + index * nbytes)
            file.write(struct.pack("<f", first_element(index)))
        file.truncate(begin + DEPTH * nbytes)
    return folder


def inside_a_group(folder: str, members: str) -> None:
    Path(members).write_text(str(os.getpid()))
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))
    x = torch.zeros(1, WIDTH)
    x[0, 0] = expected = 1.0
    for index in range(DEPTH):
        expected *= first_element(index)
    with wsm.stream(net, folder, device="cpu", device_memory=64 * MIB) as streamed:
        for _ in range(2):
            with torch.inference_mode():
                y = streamed(x)
            assert y[0, 0].item() == expected
            assert y.count_nonzero() == 1
        print(json.dumps(streamed.stats()["memory"]))


def test_auto_stays_inside_a_control_group(tmp_path: Path, group: Group) -> None:
    done = run(inside_a_group, save_sparse(tmp_path), group.folder / "cgroup.procs")
    assert done.returncode != -signal.SIGKILL, "it was killed: it took more than its group has"
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout.splitlines()[-1])
    # As much as is good, and not all that the machine has: the whole model does not fit.
    assert 50 * MIB < memory["host_bytes"] <= memory["host_budget_bytes"] < GROUP_BYTES
    peak = group.peak_bytes()
    assert peak is None or memory["host_bytes"] < peak <= GROUP_BYTES

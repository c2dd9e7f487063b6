"""What streaming does to the page cache: what it has is used, extent by extent, and nothing that a
run reads stays in it, or drives out what was there.

Each scenario runs in a process of its own, since it may forbid system calls.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import make_net, on_meta, save
from surroundings import NotHereError, cached_pages, drop, forbid, in_a_child, warm
from test_reader_ladder import LAYERS, MIB, STREAMED, STREAMING, folder, resident, result

import wsm_ext as wsm

__all__ = ["folder"]  # the fixture

PAGE = os.sysconf("SC_PAGESIZE")
BUFFERED = {"direct": "off"}


def refuse_direct() -> None:
    forbid("openat", errno.EINVAL, flag=(2, os.O_DIRECT))


def hide_cachestat() -> None:
    forbid("cachestat", errno.ENOSYS)


def hide_both() -> None:
    """As of the files of others: the kernel does not tell what of them is cached."""
    forbid("cachestat", errno.EPERM)
    forbid("mincore", errno.ENOSYS)


def share(file: Path, begin: int = 0, end: int | None = None) -> float:
    """Of the pages that lie whole in the range, how many are cached."""
    stop = len(cached_pages(file)) if end is None else end // PAGE
    pages = cached_pages(file)[-(-begin // PAGE) : stop]
    return sum(pages) / len(pages)


def stream_of(folder: Path, config: dict[str, Any]) -> wsm.StreamedModule:
    net = on_meta(make_net(layers=LAYERS), layers=LAYERS)
    return wsm.stream(net, folder, **STREAMED, config={**STREAMING, **config})


# -- what is cached is read from the cache ---------------------------------------------------------


def passes_over_half_warm_files(
    folder: Path, config: dict[str, Any], change: Callable[[], None] | None
):
    """By file: the share of bytes read directly, and the shares of the warm and of the cold half
    that are cached afterwards."""
    files = sorted(folder.iterdir())
    for file in files:
        drop(file)
        warm(file, 0, file.stat().st_size // 2 + 12345)
    if change is not None:
        change()
    with stream_of(folder, config) as streamed:
        for _ in range(3):
            assert torch.equal(result(streamed), result(resident()))
        readers = streamed.stats()["readers"]
    found = []
    for file in files:
        use = readers[str(file)]
        half = file.stat().st_size // 2
        direct = use["direct_bytes"] / (use["direct_bytes"] + use["buffered_bytes"])
        found.append((direct, share(file, 0, half), share(file, half + 12345 + PAGE)))
    return found


@pytest.mark.parametrize("change", [None, hide_cachestat])
def test_each_extent_is_read_the_way_that_suits_it(
    change: Callable[[], None] | None, folder: Path
) -> None:
    found, _ = in_a_child(passes_over_half_warm_files, folder, {}, change)
    for direct, warm_half, cold_half in found:
        # Chunks that are warm in part are read directly, and a machine may lose pages by itself.
        assert 0.25 < direct < 0.98
        assert warm_half > 0.9  # a machine may lose pages by itself
        assert cold_half < 0.02


@pytest.mark.parametrize(
    ("config", "change"),
    [(BUFFERED, None), (BUFFERED, hide_cachestat), ({}, refuse_direct)],
    ids=["turned off", "turned off, without cachestat", "refused"],
)
def test_buffered_reads_leave_the_page_cache_as_it_was(
    config: dict[str, Any], change: Callable[[], None] | None, folder: Path
) -> None:
    found, _ = in_a_child(passes_over_half_warm_files, folder, config, change)
    for direct, warm_half, cold_half in found:
        assert direct == 0
        assert warm_half > 0.9  # a machine may lose pages by itself
        assert cold_half < 0.02


def test_what_the_kernel_does_not_tell_is_read_directly(folder: Path) -> None:
    found, _ = in_a_child(direct_share_of_hidden, folder)
    assert found == [1.0, 1.0]


def direct_share_of_hidden(folder: Path) -> list[float]:
    for file in folder.iterdir():
        warm(file)
    hide_both()
    with stream_of(folder, {}) as streamed:
        assert torch.equal(result(streamed), result(resident()))
        uses = streamed.stats()["readers"].values()
    return [u["direct_bytes"] / (u["direct_bytes"] + u["buffered_bytes"]) for u in uses]


def test_direct_reads_that_are_asked_for_ignore_the_page_cache(folder: Path) -> None:
    found, _ = in_a_child(passes_over_half_warm_files, folder, {"direct": "on"}, None)
    assert [direct for direct, *_ in found] == [1.0, 1.0]


# -- what a run does beside its passes -------------------------------------------------------------


def everything_else(folder: Path, config: dict[str, Any]) -> list[float]:
    """Opens, fetches, compares tied weights, resizes: what is cached of the files afterwards."""
    net = make_net(layers=LAYERS, tied=True)
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    from safetensors.torch import save_file

    place = folder.parent / "tied" / "model.safetensors"
    place.parent.mkdir(exist_ok=True)
    save_file(tensors, place)  # the tied pair twice: it is compared
    drop(place)
    module = on_meta(net, layers=LAYERS, tied=True)
    with wsm.stream(module, place, **STREAMED, config={**STREAMING, **config}) as streamed:
        for name, parameter in net.named_parameters():
            assert torch.equal(streamed.fetch(name), parameter)
        streamed.resize(host_memory=16 * MIB)
        assert torch.equal(result(streamed), result(net))
    return [share(place)]


@pytest.mark.parametrize("config", [{}, BUFFERED], ids=["direct", "buffered"])
def test_nothing_else_that_is_read_stays_either(config: dict[str, Any], folder: Path) -> None:
    (left,), _ = in_a_child(everything_else, folder, config)
    # What is fetched while it is also read ahead: each may take the other's pages for older ones.
    assert left < 0.1


# -- the files of others ---------------------------------------------------------------------------

_GROUP = Path("/sys/fs/cgroup/memory/wsm-test")  # version 1
_GROUP_2 = Path("/sys/fs/cgroup/wsm-test")
_MODEL_LAYERS = 40
_ROOM = 96 * MIB  # for the page cache: less than the model's 218 MiB


def enter_a_group_with_little_memory() -> Callable[[], None]:
    """From here on what this process takes, page cache included, has little room; what it has
    stays counted elsewhere. What ends that."""
    for group, file in ((_GROUP, "memory.limit_in_bytes"), (_GROUP_2, "memory.max")):
        if not (group.parent / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
            (group / file).write_text(str(_ROOM))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            raise NotHereError(f"control groups: {error}") from None

        def leave(group: Path = group) -> None:
            (group.parent / "cgroup.procs").write_text(str(os.getpid()))
            group.rmdir()

        return leave
    raise NotHereError("no control group for memory")


def stream_beside_a_bystander(folder: Path, config: dict[str, Any], control: bool):
    """The shares of a warm file that are cached before and after two passes over a model that is
    larger than the room for the page cache; `control`: after merely reading the model."""
    model = save(make_net(layers=_MODEL_LAYERS), folder.parent / "large")
    (shard,) = model.iterdir()
    bystander = folder.parent / "bystander"
    bystander.write_bytes(bytes(24 * MIB))
    drop(shard)
    drop(bystander)
    net = on_meta(make_net(layers=_MODEL_LAYERS), layers=_MODEL_LAYERS)
    config = {**STREAMING, **config}
    with wsm.stream(net, model, **STREAMED, config=config) as streamed:
        result(streamed)
        leave = enter_a_group_with_little_memory()
        try:
            warm(bystander)
            before = share(bystander)
            if control:
                with open(shard, "rb") as file:
                    while file.read(MIB):
                        pass
            else:
                for _ in range(2):
                    result(streamed)
            return before, share(bystander), share(shard)
        finally:
            leave()


@pytest.mark.parametrize("config", [{}, BUFFERED], ids=["direct", "buffered"])
def test_a_run_does_not_push_out_the_files_of_others(config: dict[str, Any], folder: Path) -> None:
    (before, after, own), _ = in_a_child(stream_beside_a_bystander, folder, config, False)
    assert min(before, after) > 0.9
    assert own < 0.05


def test_reading_as_usual_does_push_them_out(folder: Path) -> None:
    """That the one above can fail."""
    (before, after, _), _ = in_a_child(stream_beside_a_bystander, folder, {}, True)
    assert before > 0.9
    assert after < 0.7

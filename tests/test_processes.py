"""Streams and the process around them: forks, signals, threads, exits, and what is left behind.

What must not happen inside pytest happens in a process of its own: each scenario is a function of
this file that takes the checkpoint's folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import gc
import mmap
import os
import re
import signal
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens
from surroundings import run_python
from torch import nn
from waits import LIMIT_S, engine_threads, is_inside, wait_for_engines_to_end, wait_until

import wsm_ext as wsm
from wsm_ext.modules.placeholder import StreamedParameter

MIB = 1 << 20
LAYERS = 6
# All layers come from the disk in every pass, through an arena of a few of them.
STREAMED: dict[str, Any] = {
    "device": "cpu",
    "device_memory": 24 * MIB,
    "host_memory": 8 * MIB,
    "config": {"home_bytes": 0, "chunk_mb": 1.0, "staging_mb": 8, "poison": True},
}
NOT_PERMITTED = 77


def settings(**config: Any) -> dict[str, Any]:
    return {**STREAMED, "config": {**STREAMED["config"], **config}}


@functools.cache
def resident() -> Net:
    return make_net(layers=LAYERS)


def open_net(folder: Path, **config: Any) -> wsm.StreamedModule:
    return wsm.stream(on_meta(resident(), layers=LAYERS), folder, **settings(**config))


@torch.inference_mode()
def result(net: nn.Module, seed: int = 3) -> torch.Tensor:
    return net(tokens(seed=seed))


@pytest.fixture(scope="module")
def net() -> Net:
    return resident()


@pytest.fixture(scope="module")
def folder(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(net, tmp_path_factory.mktemp("net"), shards=2)


def in_a_process(scenario: Callable[[Path], None], folder: Path) -> str:
    """Runs it in an interpreter of its own, which must end well and in time. What it logged."""
    limit_s = LIMIT_S + int(os.environ.get("WSM_TEST_CYCLES", "0"))
    code = (
        "import sys, pathlib, test_processes as t\n"
        f"t.{scenario.__name__}(pathlib.Path(sys.argv[1]))"
    )
    done = run_python("-c", code, folder, limit_s=limit_s)
    if done.returncode == NOT_PERMITTED:
        pytest.skip("this process may not use userfaultfd")
    assert done.returncode == 0, done.stderr
    assert "Fatal" not in done.stderr
    assert "terminate" not in done.stderr
    return done.stderr


class AbsentPages:
    """A parameter in memory whose pages can be taken away: who reads them then waits for them.

    So a read takes as long as a test wants. The memory is watched with userfaultfd.
    """

    _USER_MODE_ONLY = 1
    _API, _REGISTER, _COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03

    def __init__(self, values: torch.Tensor) -> None:
        import ctypes

        self._libc = ctypes.CDLL(None, use_errno=True)
        size = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._all = torch.frombuffer(self._memory, dtype=values.dtype)
        self.tensor = self._all[: values.numel()].view(values.shape)
        self.tensor.copy_(values)
        number = {"x86_64": 323, "aarch64": 282}.get(os.uname().machine, -1)
        self._watch = self._libc.syscall(number, os.O_CLOEXEC | self._USER_MODE_ONLY)
        if self._watch < 0:
            os._exit(NOT_PERMITTED)
        fcntl.ioctl(self._watch, self._API, struct.pack("QQQ", 0xAA, 0, 0))

    def take_away(self) -> None:
        self._kept = self._all.clone()
        self._memory.madvise(mmap.MADV_DONTNEED)
        size = self._all.nbytes
        registration = struct.pack("QQQQ", self._all.data_ptr(), size, 1, 0)
        fcntl.ioctl(self._watch, self._REGISTER, registration)

    def wait_for_reader(self) -> None:
        os.read(self._watch, 32)

    def bring_back(self) -> None:
        size = self._all.nbytes
        copy = struct.pack("QQQQq", self._all.data_ptr(), self._kept.data_ptr(), size, 0, 0)
        fcntl.ioctl(self._watch, self._COPY, copy)


def net_with_absent_pages() -> tuple[Net, AbsentPages]:
    net = make_net(layers=LAYERS)
    owner = net.layers[4].mlp[0]
    pages = AbsentPages(owner.weight.detach())
    owner.weight = nn.Parameter(pages.tensor, requires_grad=False)
    return net, pages


# -- forks -----------------------------------------------------------------------------------------


def refused_in_a_child(streamed: wsm.StreamedModule) -> None:
    child = os.fork()
    if child == 0:
        for use in (lambda: result(streamed), lambda: streamed.fetch("head.weight")):
            with pytest.raises(wsm.EngineError, match=r"fork.*open it again in the child"):
                use()
        streamed.close()
        sys.exit(0)  # not os._exit: what runs at an exit must do no harm either
    assert os.waitpid(child, 0)[1] == 0


def fork_between_passes_and_during_one(folder: Path) -> None:
    expected = result(resident())
    inside, forked = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        inside.set()
        assert forked.wait(LIMIT_S)

    results = []
    with open_net(folder) as streamed:
        results.append(result(streamed))
        refused_in_a_child(streamed)
        results.append(result(streamed))
        hook = streamed.layers[2].mlp.register_forward_pre_hook(pause)
        thread = threading.Thread(target=lambda: results.append(result(streamed)))
        thread.start()
        assert inside.wait(LIMIT_S)
        refused_in_a_child(streamed)
        forked.set()
        thread.join()
        hook.remove()
        results.append(result(streamed))
    assert len(results) == 4
    assert all(torch.equal(found, expected) for found in results)


class Prompts(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return tokens(seed=index)[0]


def load_data_with_forked_workers(folder: Path) -> None:
    """Workers that are started between passes, and in the middle of one."""

    def loader() -> Any:
        batches = torch.utils.data.DataLoader(
            Prompts(), batch_size=2, num_workers=2, multiprocessing_context="fork"
        )
        return iter(batches)

    expected = [result(resident(), seed) for seed in range(3)]
    started: list[Any] = []
    with open_net(folder) as streamed:
        hook = streamed.layers[2].mlp.register_forward_pre_hook(
            lambda *_: started.append(loader()) if not started else None
        )
        assert torch.equal(result(streamed, 0), expected[0])
        hook.remove()
        for batches in (started[0], loader()):
            for index, batch in enumerate(batches):
                assert torch.equal(batch[0], Prompts()[2 * index])
                seed = index % 3
                assert torch.equal(result(streamed, seed), expected[seed])


def test_data_workers_are_forked_beside_a_stream(folder: Path) -> None:
    in_a_process(load_data_with_forked_workers, folder)


def test_a_forked_child_is_told_to_open_its_own(folder: Path) -> None:
    in_a_process(fork_between_passes_and_during_one, folder)


# -- Ctrl-C and reads that do not end --------------------------------------------------------------


def interrupted_while_waiting(_: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    net, pages = net_with_absent_pages()
    expected = result(net)
    streamed = wsm.stream(net, **settings(lookahead_units=0, cpu_prefetch_distance=0))
    assert torch.equal(result(streamed), expected)
    pages.take_away()

    def press_ctrl_c() -> None:
        pages.wait_for_reader()
        wait_until(lambda: is_inside(threading.main_thread(), "wrapped_forwards.py"), "the wait")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_ctrl_c, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            result(streamed)
    finally:
        pages.bring_back()  # or nobody could close it
    assert stopped.traceback[-1].path.name == "wrapped_forwards.py"  # in the wait itself
    for seed in (3, 4):
        assert torch.equal(result(streamed, seed), result(resident(), seed))
    streamed.close()
    assert torch.equal(result(net), expected)


def until_it_is_missed(streamed: wsm.StreamedModule) -> str:
    """The error of the read that never ends; a busy machine may take too long for others before."""
    while True:
        with pytest.raises(TimeoutError) as late:
            result(streamed)
        if "'layers.4'" in str(late.value):
            return str(late.value)


def a_read_that_never_ends(_: Path) -> None:
    net, pages = net_with_absent_pages()
    # Threads and slots enough for others beside those that are stuck.
    options = settings(
        lookahead_units=0, cpu_prefetch_distance=0, read_timeout_s=0.3, read_threads=8
    )
    streamed = wsm.stream(net, **options)
    pages.take_away()
    for _attempt in range(2):
        assert re.search(r"'layers\.4'.*read_timeout_s", until_it_is_missed(streamed))
    streamed.close()
    assert "forward" not in net.layers[4].__dict__


def a_read_that_never_ends_at_exit(_: Path) -> None:
    net, pages = net_with_absent_pages()
    options = settings(lookahead_units=0, cpu_prefetch_distance=0, read_timeout_s=1)
    streamed = wsm.stream(net, **options)
    pages.take_away()
    threading.Thread(target=until_it_is_missed, args=[streamed], daemon=True).start()
    pages.wait_for_reader()


def left_open_at_exit(_: Path) -> None:
    streamed = wsm.stream(resident(), **settings())
    result(streamed)


def test_who_leaves_a_model_open_hears_nothing_at_exit(folder: Path) -> None:
    assert in_a_process(left_open_at_exit, folder) == ""


def test_ctrl_c_ends_a_wait(folder: Path) -> None:
    in_a_process(interrupted_while_waiting, folder)


def test_a_read_that_never_ends_is_an_error_and_does_not_hold_up_close(folder: Path) -> None:
    logged = in_a_process(a_read_that_never_ends, folder)
    assert "[WSM] closing: a read has not ended" in logged


def test_a_read_that_never_ends_does_not_hold_up_the_exit(folder: Path) -> None:
    in_a_process(a_read_that_never_ends_at_exit, folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_of_progress_leaves_the_module_as_it_was(
    error: type[BaseException], net: Net, folder: Path
) -> None:
    module = on_meta(net, layers=LAYERS)
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    options = {**STREAMED, "device_memory": 64 * MIB, "config": {}}

    def progress(done: int, total: int) -> None:
        assert 0 <= done <= total
        raise error

    with pytest.raises(error):
        wsm.stream(module, folder, progress=progress, **options)
    for name, parameter in module.named_parameters():
        assert parameter is parameters[name]
    for name, buffer in module.named_buffers():
        assert buffer is buffers[name]
    assert not any("forward" in inner.__dict__ for inner in module.modules())
    with wsm.stream(module, folder, **options) as streamed:
        assert torch.equal(result(streamed), result(net))


# -- exits -----------------------------------------------------------------------------------------


def exit_beside_a_thread_in_a_pass(folder: Path) -> None:
    streamed = open_net(folder)
    inside = threading.Event()

    def stay(*_: object) -> None:
        inside.set()
        threading.Event().wait()

    streamed.layers[2].mlp.register_forward_pre_hook(stay)
    threading.Thread(target=result, args=[streamed], daemon=True).start()
    assert inside.wait(LIMIT_S)


def exit_from_a_forward_while_another_reads_ahead(folder: Path) -> None:
    globals()["kept_to_the_end"] = open_net(folder)
    streamed = open_net(folder)
    streamed.layers[3].mlp.register_forward_hook(lambda *_: sys.exit(0))
    result(streamed)


def exit_at_once_from_a_forward(folder: Path) -> None:
    streamed = open_net(folder)
    streamed.layers[3].mlp.register_forward_hook(lambda *_: os._exit(0))
    result(streamed)
    os._exit(1)


@pytest.mark.parametrize(
    "scenario",
    [
        exit_beside_a_thread_in_a_pass,
        exit_from_a_forward_while_another_reads_ahead,
        exit_at_once_from_a_forward,
    ],
)
def test_an_exit_without_close(scenario: Callable[[Path], None], folder: Path) -> None:
    in_a_process(scenario, folder)


# -- what is left behind ---------------------------------------------------------------------------


def held() -> tuple[int, int]:
    """Descriptors and bytes of memory of this process, when no engine is left: waits for that."""
    gc.collect()
    wait_for_engines_to_end()
    # Blocks below 32 MiB stay with malloc when they are freed: they are no leak.
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * mmap.PAGESIZE


def open_and_drop_often(folder: Path) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    def cycle(index: int) -> None:
        streamed = open_net(folder)
        result(streamed)
        if index % 5 == 1:
            return  # dropped
        if index % 5 == 2:
            streamed.resize(device_memory=30 * MIB)
            result(streamed)
        if index % 5 == 3:
            hook = streamed.layers[3].mlp.register_forward_hook(fail)
            with contextlib.suppress(ZeroDivisionError):
                result(streamed)
            hook.remove()
        if index % 5 == 4:
            with contextlib.suppress(ValueError):
                streamed.resize(device_memory=MIB)
        streamed.close()

    for index in range(10):
        cycle(index)
    before = held()
    for index in range(int(os.environ.get("WSM_TEST_CYCLES", "50"))):
        cycle(index)
    after = held()
    assert after[0] == before[0], f"{before[0]} descriptors, then {after[0]}"
    # A cycle maps 8 MiB of host memory, so leaving it every third time takes more than this.
    assert after[1] - before[1] < 100 * MIB, f"{(after[1] - before[1]) / MIB:.1f} MiB more"


def test_nothing_is_left_of_streams_that_were_closed_or_dropped(folder: Path) -> None:
    in_a_process(open_and_drop_often, folder)


def test_close_alone_gives_back_threads_and_descriptors(folder: Path) -> None:
    with open_net(folder) as warm_up:
        result(warm_up)
    del warm_up
    before = held()
    streamed = open_net(folder)
    result(streamed)
    assert engine_threads()
    streamed.close()
    assert held()[0] == before[0]


# -- threads and errors ----------------------------------------------------------------------------


def test_an_error_in_one_thread_does_not_touch_the_other(net: Net, folder: Path) -> None:
    expected = result(net)
    failed: list[BaseException] = []
    found: list[bool] = []

    def fail_in_its_thread(*_: object) -> None:
        if threading.current_thread().name == "fails":
            raise ZeroDivisionError

    with open_net(folder) as streamed:
        streamed.layers[3].mlp.register_forward_hook(fail_in_its_thread)

        def fails() -> None:
            for _ in range(5):
                try:
                    result(streamed)
                except ZeroDivisionError as error:
                    failed.append(error)

        def works() -> None:
            for _ in range(5):
                found.append(torch.equal(result(streamed), expected))

        threads = [threading.Thread(target=job, name=job.__name__) for job in (fails, works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
    assert len(failed) == 5
    assert found == [True] * 5


def test_two_models_in_two_threads(net: Net, folder: Path) -> None:
    expected = result(net)
    found: list[bool] = []

    def run() -> None:
        with open_net(folder) as streamed:
            for _ in range(3):
                found.append(torch.equal(result(streamed), expected))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert found == [True] * 6


def test_close_ends_the_pass_of_another_thread(folder: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()
    raised: list[str] = []

    def pause(*_: object) -> None:
        inside.set()
        assert go_on.wait(LIMIT_S)

    def work() -> None:
        with pytest.raises(wsm.EngineError) as error:
            result(streamed)
        raised.append(str(error.value))

    streamed = open_net(folder)
    engine, module = wsm.handle(streamed).session.engine, streamed
    module.layers[2].mlp.register_forward_pre_hook(pause)
    working, closing = threading.Thread(target=work), threading.Thread(target=streamed.close)
    working.start()
    assert inside.wait(LIMIT_S)
    closing.start()
    wait_until(lambda: engine.closed, "the close")
    go_on.set()
    for thread in (working, closing):
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert "closed" in raised[0]
    assert not any("forward" in inner.__dict__ for inner in module.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("path", ["embed", "layers.3", "layers.3.mlp.1", "head"])
def test_an_error_in_a_forward_is_passed_on_and_forgotten(
    error: type[BaseException], path: str, net: Net, folder: Path
) -> None:
    with open_net(folder) as streamed:

        def fail(*_: object) -> None:
            raise error

        hook = streamed.get_submodule(path).register_forward_hook(fail)
        for _ in range(2):
            with pytest.raises(error):
                result(streamed)
        hook.remove()
        for name in ("embed.weight", "layers.3.mlp.0.weight", "head.weight"):
            assert type(streamed.get_parameter(name)) is StreamedParameter
        for seed in (3, 4):
            assert torch.equal(result(streamed, seed), result(net, seed))


def test_one_stream_inside_the_forward_of_another(net: Net, folder: Path) -> None:
    expected = [result(net, seed) for seed in (3, 4)]
    found: list[torch.Tensor] = []
    with open_net(folder) as outer, open_net(folder) as inner:
        outer.layers[3].mlp.register_forward_hook(lambda *_: found.append(result(inner, seed=4)))
        for _ in range(3):
            assert torch.equal(result(outer), expected[0])
    assert len(found) == 3
    assert all(torch.equal(each, expected[1]) for each in found)


def test_close_inside_a_forward_is_refused(net: Net, folder: Path) -> None:
    refused: list[str] = []

    def close(*_: object) -> None:
        with pytest.raises(RuntimeError) as error:
            streamed.close()
        refused.append(str(error.value))

    with open_net(folder) as streamed:
        hook = streamed.layers[2].mlp.register_forward_hook(close)
        assert torch.equal(result(streamed), result(net))
        assert "close() is for between passes" in refused[0]
        hook.remove()
        assert torch.equal(result(streamed), result(net))
    assert not any("forward" in inner.__dict__ for inner in streamed.modules())

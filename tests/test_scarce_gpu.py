"""A GPU that is nearly full: a smaller plan, or an error that says what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens

import wsm_ext as wsm

pytestmark = pytest.mark.gpu

MIB = 1 << 20
LAYERS = 24  # 124 MiB
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net(layers=LAYERS)


@pytest.fixture(scope="module")
def folder(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(net, tmp_path_factory.mktemp("net"), shards=2)


@torch.inference_mode()
def expected(net: Net, x: torch.Tensor) -> torch.Tensor:
    """What the module gives on the GPU; its libraries have what memory they need after that."""
    y = net.to(GPU)(x).cpu()
    net.to("cpu")
    return y


@torch.inference_mode()
def result(streamed: wsm.StreamedModule, x: torch.Tensor) -> torch.Tensor:
    return streamed(x).cpu()


@contextlib.contextmanager
def torch_may_take(nbytes: int) -> Iterator[None]:
    """What torch has now, and so much more: beyond it, its allocator says that memory is out."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    most = torch.cuda.memory_reserved(GPU) + nbytes
    torch.cuda.set_per_process_memory_fraction(most / total, GPU)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


@contextlib.contextmanager
def all_taken_but(nbytes: int) -> Iterator[None]:
    """At most `nbytes` of the GPU are free within, and about half of it at least.

    Half of it must be 10 MiB or more: for less, torch takes 20 MiB.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    blocks = []
    try:
        for size in (1024 * MIB, 128 * MIB, nbytes // 2):
            while torch.cuda.mem_get_info(GPU)[0] - size >= nbytes // 2:
                blocks.append(torch.empty(size, dtype=torch.uint8, device=GPU))
        assert torch.cuda.mem_get_info(GPU)[0] <= nbytes
        yield
    finally:
        blocks.clear()  # the frame lives on in a failure's traceback
        torch.cuda.empty_cache()


def words_of(error: type[Exception], run: Callable[[], object]) -> str:
    """The error itself would keep the tensors of the frames that it came through."""
    try:
        run()
    except error as raised:
        return str(raised)
    pytest.fail(f"no {error.__name__}")


def test_a_smaller_plan_where_the_gpu_has_less_than_asked_for(net: Net, folder: Path) -> None:
    x = tokens().to(GPU)
    right = expected(net, x)
    with (
        torch_may_take(90 * MIB),
        pytest.warns(UserWarning, match=r"the device has no 1.*planned again with"),
    ):
        streamed = wsm.stream(
            on_meta(net, layers=LAYERS),
            folder,
            device=GPU,
            device_memory=120 * MIB,
            host_memory=32 * MIB,
        )
    with streamed:
        assert streamed.stats()["memory"]["device_bytes"] <= 90 * MIB
        assert any("planned again with" in text for text in streamed.plan.warnings)
        for _ in range(2):
            assert torch.equal(result(streamed, x), right)


def test_shrink_makes_room_for_a_forward_that_ran_out_of_memory(net: Net, folder: Path) -> None:
    x = tokens(8, 512).to(GPU)  # its largest activations take 24 MiB each
    right = expected(net, x)
    with (
        wsm.stream(
            on_meta(net, layers=LAYERS),
            folder,
            device=GPU,
            device_memory=116 * MIB,
            host_memory=32 * MIB,
        ) as streamed,
        all_taken_but(40 * MIB),
    ):
        words = words_of(torch.OutOfMemoryError, lambda: result(streamed, x))
        assert "shrink('1GiB')" in words
        streamed.shrink(92 * MIB)
        for _ in range(2):
            assert torch.equal(result(streamed, x), right)
        assert streamed.stats()["memory"]["device_bytes"] <= 24 * MIB


def test_memory_that_torch_was_refused_does_not_matter_to_the_stream(
    net: Net, folder: Path
) -> None:
    x = tokens().to(GPU)
    right = expected(net, x)
    with wsm.stream(
        on_meta(net, layers=LAYERS),
        folder,
        device=GPU,
        device_memory=32 * MIB,
        host_memory=32 * MIB,
    ) as streamed:
        total = torch.cuda.get_device_properties(GPU).total_memory
        for _ in range(2):
            refused = words_of(
                torch.OutOfMemoryError,
                lambda: torch.empty(2 * total, dtype=torch.uint8, device=GPU),
            )
            assert "out of memory" in refused
            assert torch.equal(result(streamed, x), right)

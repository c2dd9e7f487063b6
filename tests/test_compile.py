"""torch.compile over streamed modules: the same outputs, and nothing compiled again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens
from torch._dynamo.utils import counters

import wsm_ext as wsm

MIB = 1 << 20
BUDGETS = {
    "device_memory": 21 * MIB,
    "host_memory": 8 * MIB,
    "config": {"chunk_mb": 1.0, "poison": True, "home_bytes": 0},
}


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net(layers=4).requires_grad_(False)


@pytest.fixture(scope="module")
def folder(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(net, tmp_path_factory.mktemp("net"))


@pytest.fixture
def streamed(net: Net, folder: Path, device: torch.device) -> Any:
    torch._dynamo.reset()
    counters.clear()
    net.to(device)
    with wsm.stream(on_meta(net, layers=4), folder, device=device, **BUDGETS) as made:
        yield made
    net.to("cpu")
    torch._dynamo.reset()


def graphs() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["recompiles"].values())


def check(run: Any, net: Net, device: torch.device) -> None:
    """Two passes may compile; none after them does."""
    for number in range(5):
        x = tokens(seed=number).to(device)
        with torch.no_grad():
            assert torch.equal(run(x), net(x)), number
        if number == 1:
            compiled = graphs()
            assert compiled[0] > 0
    assert graphs() == compiled


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_layers(backend: str, streamed: wsm.StreamedModule, net: Net, device: torch.device) -> None:
    for layer in streamed.layers:
        layer.compile(backend=backend)
    check(streamed, net, device)


def test_the_whole_module(streamed: wsm.StreamedModule, net: Net, device: torch.device) -> None:
    check(torch.compile(streamed, backend="eager"), net, device)


def test_the_streamed_module_itself(
    streamed: wsm.StreamedModule, net: Net, device: torch.device
) -> None:
    check(torch.compile(streamed, backend="eager"), net, device)


def test_backward_of_compiled_layers(
    streamed: wsm.StreamedModule, net: Net, device: torch.device
) -> None:
    for module in (streamed, net):
        for layer in module.layers:
            layer.compile(backend="aot_eager")
    try:
        for number in range(3):
            found = []
            for module in (streamed, net):
                torch.manual_seed(number)
                x = torch.randn(2, 5, 384, device=device, requires_grad=True)
                y = x
                for layer in module.layers:
                    y = layer(y)
                y.square().sum().backward()
                found += [y, x.grad]
            assert torch.equal(found[0], found[2])
            assert torch.equal(found[1], found[3])
    finally:
        for layer in net.layers:
            layer._compiled_call_impl = None


def test_fullgraph_says_why_not(
    streamed: wsm.StreamedModule, net: Net, device: torch.device
) -> None:
    compiled = torch.compile(streamed, backend="eager", fullgraph=True)
    with (
        torch.no_grad(),
        pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph"),
    ):
        compiled(tokens().to(device))
    with torch.no_grad():
        x = tokens().to(device)
        assert torch.equal(streamed(x), net(x))


@pytest.mark.gpu
def test_a_model_that_stays_whole_can_be_captured(net: Net, folder: Path) -> None:
    """Nothing streams, so nothing is wrapped, and a CUDA graph holds the whole forward."""
    gpu = torch.device("cuda")
    net.to(gpu)
    budgets = {"device_memory": "256MiB", "host_memory": "64MiB"}
    with (
        wsm.stream(on_meta(net, layers=4), folder, device=gpu, **budgets) as streamed,
        torch.no_grad(),
    ):
        assert not any("forward" in inner.__dict__ for inner in streamed.modules())
        x = tokens().to(gpu)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # what the libraries allocate at first cannot be captured
                streamed(x)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = streamed(x)
        for seed in (5, 6):
            x.copy_(tokens(seed=seed))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, streamed(x))
            assert torch.equal(y, net(x))
    net.to("cpu")

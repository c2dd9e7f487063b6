"""Whatever device or mode of torch the caller has set, memory of ours lies where it should."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._device import _device_constructors

import wsm_ext as wsm
from wsm_ext.commands.cli import main
from wsm_ext.hf.synthetic import make_llama_checkpoint
from wsm_ext.modules.raw_memory import address_of, empty_in_ram, without_modes

PACKAGE = Path(wsm.__file__).parent
BUDGETS = {"device": "cpu", "device_memory": "20MiB", "host_memory": "80MiB"}
CONSTRUCTORS = {function.__name__ for function in _device_constructors()}

MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "meta": lambda: torch.device("meta"),
    "fake": FakeTensorMode,
    "inference": torch.inference_mode,
}
mode = pytest.mark.parametrize("mode", MODES)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(ours(tokens()), theirs(tokens()))


def test_every_allocation_names_its_device() -> None:
    unnamed = [
        f"{file.relative_to(PACKAGE)}:{call.lineno}: torch.{call.func.attr}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in CONSTRUCTORS
        and not any(word.arg == "device" for word in call.keywords)
    ]
    assert unnamed == []


@mode
def test_a_module_s_own_weights_come_back(mode: str) -> None:
    own, reference = make_net(), make_net()
    with MODES[mode]():
        streamed = wsm.stream(own, **BUDGETS)
    assert same(streamed, reference)
    with MODES[mode]():
        streamed.resize(device_memory="24MiB")
    assert same(streamed, reference)
    with MODES[mode]():
        fetched = streamed.fetch("layers.1.self_attn.weight")
        streamed.close()
    assert torch.equal(fetched, reference.layers[1].self_attn.weight)
    assert same(own, reference)
    for parameter in own.parameters():
        assert type(parameter) is nn.Parameter
        assert type(parameter.data) is torch.Tensor
        assert not parameter.is_inference()


@mode
def test_a_checkpoint_s_buffers_and_weights(mode: str, tmp_path: Path) -> None:
    reference = make_net()
    save(reference, tmp_path)
    module = on_meta(reference)
    with MODES[mode]():
        streamed = wsm.stream(module, tmp_path, **BUDGETS)
    with streamed:
        assert same(streamed, reference)
        for name, buffer in reference.named_buffers():
            assert torch.equal(streamed.get_buffer(name), buffer)


def test_casts_and_checks_under_a_default_device(tmp_path: Path) -> None:
    make_llama_checkpoint(
        tmp_path, layers=2, hidden=64, intermediate=128, heads=2, kv_heads=2, vocab=64
    )
    assert main(["verify", str(tmp_path)]) == 0
    ids = torch.tensor([[1, 2, 3]])
    options = {**BUDGETS, "dtype": torch.float32}
    with wsm.from_pretrained(tmp_path, **options) as model, torch.no_grad():
        expected = model(ids).logits
    streaming = {**options, "device_memory": "12MiB", "config": {"home_bytes": 0}}
    for budgets in (options, streaming):
        with torch.device("meta"):
            model = wsm.from_pretrained(tmp_path, verify=True, **budgets)
        with model, torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
            with torch.device("meta"):
                assert torch.equal(model(ids).logits, expected)
                weight = model.fetch("model.layers.0.mlp.up_proj.weight")
            assert weight.device.type == "cpu"
            assert weight.dtype == torch.float32


class Views(nn.Module):
    """Parameters that share bytes: all of them, some of them, with themselves."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(3 * 256 * 256)
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(12))
        self.layers[1].weight = nn.Parameter(self.layers[0].weight.data)
        self.layers[3].weight = nn.Parameter(self.layers[2].weight.data.t())
        self.layers[4].weight = nn.Parameter(flat[: 256 * 256].view(256, 256))
        self.layers[5].weight = nn.Parameter(flat[256 * 256 - 5 :][: 256 * 256].view(256, 256))
        self.layers[6].weight = nn.Parameter(flat[2 * 256 * 256 :].view(256, 256))
        self.layers[7].weight = nn.Parameter(torch.randn(256, 1).expand(256, 256))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_parameters_that_share_bytes_share_them_again() -> None:
    module = Views()
    weights = [layer.weight for layer in module.layers]
    before = [(weight.data_ptr(), weight.stride(), weight.clone()) for weight in weights]
    with wsm.stream(module, device="cpu", device_memory="64MiB", host_memory="20MiB"):
        stayed = [index for index, weight in enumerate(weights) if weight.numel()]
    assert stayed == [0, 1, 2, 3, 4, 5, 7]
    for index, (address, stride, value) in enumerate(before):
        assert module.layers[index].weight is weights[index]
        assert torch.equal(weights[index], value)
        assert weights[index].stride() == stride
        assert index not in stayed or weights[index].data_ptr() == address


def test_a_conjugate_s_bytes_are_its_own() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            values = torch.randn(8, 128, 128, dtype=torch.complex64)
            self.layers = nn.ModuleList(nn.ParameterList([v.conj()]) for v in values)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x @ layer[0] / 100
            return x

    module = Waves().requires_grad_(False)
    expected = [layer[0].resolve_conj().clone() for layer in module.layers]
    with wsm.stream(module, device="cpu", device_memory="64MiB", host_memory="20MiB") as streamed:
        for index, value in enumerate(expected):
            assert torch.equal(streamed.fetch(f"layers.{index}.0"), value)
    for layer, value in zip(module.layers, expected, strict=True):
        assert torch.equal(layer[0], value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.empty(4, device="meta"), "a Tensor on meta"),
        (lambda: FakeTensorMode().from_tensor(torch.empty(4)), "a FakeTensor on cpu"),
        (lambda: torch.empty(4, 4).t()[1:], "a Tensor on cpu"),
        (lambda: torch.empty(4).to_sparse(), "sparse_coo"),
        (lambda: torch.empty(3), "16 bytes were asked for and 12 were given"),
    ],
)
def test_an_address_is_given_only_of_bytes_that_are_there(
    tensor: Callable[[], torch.Tensor], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        address_of(tensor(), 16)
    assert address_of(torch.empty(0, device="cpu"), 0) == 0


@mode
def test_memory_is_real_without_modes(mode: str) -> None:
    with MODES[mode](), without_modes():
        memory = empty_in_ram([3], torch.int16)
    assert type(memory) is torch.Tensor
    assert not memory.is_inference()
    assert address_of(memory, 6) == memory.data_ptr()


def test_a_sparse_parameter_is_refused() -> None:
    net: Net = make_net()
    net.head.weight = nn.Parameter(net.head.weight.detach().to_sparse())
    with pytest.raises(ValueError, match=r"'head.weight' is torch.sparse_coo.*only dense tensors"):
        wsm.stream(net, **BUDGETS)

"""Plain modules of all kinds, under all kinds of units: the bits of the resident module."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import make_net, on_meta, save, tokens
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations

import wsm_ext as wsm

WIDTH = 256
KIB = 1 << 10
MIB = 1 << 20


def linear(out: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, out)


class Shared(nn.Module):
    """One module at two places, called twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear()
        self.layers = nn.ModuleList(linear() for _ in range(3))
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.first(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.again(x)


class Conditional(nn.Module):
    """Which module runs depends on the input; the others lie in a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleDict({"even": linear(), "odd": nn.Sequential(linear(), linear())})
        self.end = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        way = "even" if int(x.abs().sum() * 1000) % 2 == 0 else "odd"
        return self.end(torch.tanh(self.ways[way](x)))


class Nested(nn.Module):
    """Each level has weights of its own around the next one's."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.own = linear()
        self.inner = Nested(depth - 1) if depth else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.own(x)) * self.scale
        return x if self.inner is None else self.inner(x) + x * self.scale


class Direct(nn.Module):
    """What the outer one gives is what the inner one gave."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.inner = Direct(depth - 1) if depth else linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.scale)


class ReadsChild(nn.Module):
    """Uses its children's weights without calling them, as Mamba does, and one both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(nn.functional.linear(x, layer.weight, layer.bias))
        x = self.layers[1](x) + self.layers[2].weight[3] + self.layers[2].weight.t()[5]
        return x * self.layers[0].weight.sum() + nn.functional.linear(x, self.layers[3].weight)


class GivesItsWeight(nn.Module):
    """What a unit gives may be its weight itself, or a view of it."""

    class Table(nn.Module):
        def __init__(self, way: str) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
            self.way = way

        def forward(self) -> Any:
            if self.way == "itself":
                return self.weight
            return {"view": self.weight[2:5].t(), "list": [self.weight.expand(2, -1, -1)]}

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(self.Table(way) for way in ["itself", "views", "itself"])
        self.layers = nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = [table() for table in self.tables]
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = x @ given[0] + x @ given[2]
        return x[..., :3] @ given[1]["view"].t() + given[1]["list"][0].sum(0)[0]


class Odd(nn.Module):
    """Complex and integer parameters, a non-persistent buffer, an empty and a skipped one."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64))
        self.index = nn.Parameter(torch.randperm(WIDTH), requires_grad=False)
        self.flags = nn.Parameter(torch.rand(WIDTH) > 0.5, requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.skipped = nn.utils.skip_init(nn.Linear, WIDTH, WIDTH)
        nn.init.normal_(self.skipped.weight)
        nn.init.zeros_(self.skipped.bias)
        self.register_buffer("steps", torch.arange(WIDTH) / WIDTH, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x.to(torch.complex64) @ self.phase).abs()[..., self.index] * self.flags
        return self.skipped(x + self.steps) + self.empty.sum()


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                parametrizations.weight_norm(linear()),
                parametrizations.spectral_norm(linear()),
                parametrizations.orthogonal(linear()),
                nn.utils.weight_norm(linear()) if hasattr(nn.utils, "weight_norm") else linear(),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Attention(nn.Module):
    """Modules of torch whose fused paths read their children's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 512, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(WIDTH, 4, 512, batch_first=True)
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x)[0] + x
        x = self.encoder(x)
        return self.recurrent(self.decoder(x, x))[0]


KINDS: dict[str, Callable[[], nn.Module]] = {
    "shared": Shared,
    "conditional": Conditional,
    "nested": Nested,
    "direct": Direct,
    "reads_child": ReadsChild,
    "gives_its_weight": GivesItsWeight,
    "odd": Odd,
    "parametrized": Parametrized,
    "attention": Attention,
}


def make(kind: str) -> nn.Module:
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # nn.utils.weight_norm, which is in use
        return KINDS[kind]().eval()


def write(module: nn.Module, file: Path) -> Path:
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in module.state_dict().items():
        tensors.setdefault(tensor.data_ptr() or id(tensor), (name, tensor.detach().contiguous()))
    save_file(dict(tensors.values()), file)
    return file


def least(module: nn.Module, device: torch.device, units: Any = "auto") -> dict[str, Any]:
    """Budgets under which everything streams: nothing stays, nothing is loaded ahead."""
    config = {"home_bytes": 0, "lookahead_units": 0, "poison": True, "chunk_mb": 0.125}
    config["staging_mb"] = 1
    return {
        "device": device,
        "device_memory": 22 * MIB,
        "host_memory": 2 * MIB,
        "units": units,
        "config": config,
    }


def inputs(device: torch.device, seed: int) -> torch.Tensor:
    return torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("units", ["layer", "group", "leaf"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(
    kind: str, units: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In eval mode, cuDNN has no backward for recurrent layers.
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    file = write(make(kind), tmp_path / "net.safetensors")
    resident = make(kind).to(device).requires_grad_(False)
    module = make(kind)
    with (
        warnings.catch_warnings(),
        wsm.stream(module, file, **least(module, device, units)) as streamed,
    ):
        warnings.simplefilter("error")
        assert streamed.plan.homes_bytes == 0
        for number in range(3):
            x = inputs(device, number)
            with torch.inference_mode():
                assert torch.equal(streamed(x), resident(x)), number
        x, y = (inputs(device, 9).requires_grad_() for _ in range(2))
        one, other = streamed(x), resident(y)
        assert torch.equal(one, other)
        one.square().sum().backward()
        other.square().sum().backward()
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_modules_own_ram_and_back(kind: str, device: torch.device) -> None:
    resident, module = make(kind), make(kind)
    x = inputs(torch.device("cpu"), 0)
    with torch.inference_mode():
        want = resident(x)
        with wsm.stream(module, **least(module, device)) as streamed:
            streamed(x.to(device))
        assert torch.equal(module(x), want)
    for name, tensor in resident.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)
    copy.deepcopy(module)


def test_a_weight_that_is_read_from_outside_is_prefetched(
    device: torch.device, tmp_path: Path
) -> None:
    """The order of use learns such a read: it is no miss then."""

    class Reads(ReadsChild):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index in (0, 3, 1, 2):
                layer = self.layers[index]
                x = torch.tanh(nn.functional.linear(x, layer.weight, layer.bias))
            return x

    module = Reads()
    file = write(module, tmp_path / "net.safetensors")
    chosen = least(module, device, "leaf")
    chosen["config"] |= {"lookahead_units": 1}
    with wsm.stream(module, file, **chosen) as streamed, torch.inference_mode():
        for _ in range(4):
            streamed(inputs(device, 0))
        assert streamed.stats()["last_pass"]["misses"] == 0


class Thief(nn.Module):
    """Reads, inside its own forward, the weight of a unit beside it."""

    def __init__(self, victim: nn.Linear) -> None:
        super().__init__()
        self.own = linear()
        self.victims = [victim]  # not a child

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.own.weight + self.victims[0].weight
        return nn.functional.linear(x, weight)


class Street(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.victim = linear()
        self.thief = Thief(self.victim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.thief(self.victim(x))


def test_a_weight_that_cannot_be_there_is_fetched_with_a_warning(
    device: torch.device, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    module = Street()
    resident = copy.deepcopy(module).to(device)
    resident.thief.victims = [resident.victim]
    module.thief.victims = [module.victim]
    file = write(module, tmp_path / "net.safetensors")
    chosen = least(module, device, ["victim", "thief"])
    with wsm.stream(module, file, **chosen) as streamed, torch.inference_mode():
        x = inputs(device, 0)
        with pytest.warns(UserWarning, match=r"'victim\.weight'.*units=\["):
            assert torch.equal(streamed(x), resident(x))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once
            assert torch.equal(streamed(x), resident(x))


def test_hooks_of_the_users_own(device: torch.device, tmp_path: Path) -> None:
    module, resident = make("shared"), make("shared").to(device)
    file = write(module, tmp_path / "net.safetensors")
    told: dict[int, list[Any]] = {id(module): [], id(resident): []}

    def hook(net: nn.Module) -> list[Any]:
        layer = net.layers[1]
        told[id(net)].clear()
        return [
            layer.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
            layer.register_forward_hook(lambda m, a, out: out + m.bias),  # a weight, from a hook
            layer.register_forward_hook(lambda m, a, out: told[id(net)].append(out.sum().item())),
        ]

    before = hook(module)
    with wsm.stream(module, file, **least(module, device)) as streamed, torch.inference_mode():
        x = inputs(device, 0)
        ours = hook(resident)
        assert torch.equal(streamed(x), resident(x))
        assert told[id(module)] == told[id(resident)] != []
        for handle in [*before, *ours]:
            handle.remove()
        assert torch.equal(streamed(x), resident(x))
        ours, theirs = hook(module), hook(resident)  # while it is streamed
        assert torch.equal(streamed(x), resident(x))
        for handle in [*ours, *theirs]:
            handle.remove()
        assert torch.equal(streamed(x), resident(x))
    assert not module.layers[1]._forward_hooks


class TestConversions:
    """What a streamed module cannot do, it refuses before anything is changed."""

    @pytest.fixture
    def streamed(self, tmp_path: Path) -> Any:
        net = make_net(layers=3)
        save(net, tmp_path)
        config = {"chunk_mb": 1.0, "poison": True}  # part of it stays on the device
        with wsm.stream(
            on_meta(net, layers=3),
            tmp_path,
            device="cpu",
            device_memory=14 * MIB,
            host_memory=8 * MIB,
            units="layer",
            config=config,
        ) as made:
            assert made.plan.device_home_bytes > 0
            assert made.plan.units[1].streamed_bytes > 0
            yield made
            with torch.inference_mode():
                assert torch.equal(made(tokens()), net(tokens()))

    def test_what_changes_nothing_is_done(self, streamed: wsm.StreamedModule) -> None:
        for module in (streamed, streamed.layers[0]):
            assert module.to("cpu") is module
            assert module.float() is module
            assert module.eval() is module
            module.zero_grad()
        assert {p.dtype for p in streamed.parameters()} == {torch.float32}
        assert {p.device.type for p in streamed.parameters()} == {"cpu"}

    def test_conversions_are_refused(self, streamed: wsm.StreamedModule) -> None:
        dtypes = {name: tensor.dtype for name, tensor in streamed.named_buffers()}
        for module in (streamed, streamed.layers[0]):
            for convert in (
                lambda m: m.half(),
                lambda m: m.to(torch.bfloat16),
                lambda m: m.to("meta"),
                lambda m: m.double(),
                lambda m: m.share_memory(),
                lambda m: m.to_empty(device="cpu"),
            ):
                with pytest.raises(RuntimeError, match=r"streamed.*close\(\)"):
                    convert(module)
        assert {name: tensor.dtype for name, tensor in streamed.named_buffers()} == dtypes

    def test_copies_are_refused(self, streamed: wsm.StreamedModule) -> None:
        for module in (streamed, streamed.layers[0]):
            for clone in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
                with pytest.raises(TypeError, match=r"after close\(\)"):
                    clone(module)
        for clone in (copy.deepcopy, copy.copy):
            with pytest.raises(TypeError, match=r"after close\(\)"):
                clone(streamed)

    def test_state_dicts(self, streamed: wsm.StreamedModule, tmp_path: Path) -> None:
        state = streamed.state_dict()  # names, shapes and dtypes, without bytes
        assert state["layers.2.mlp.0.weight"].shape == (1536, 384)
        with pytest.raises(TypeError, match=r"after close\(\)"):
            torch.save(state, io.BytesIO())
        with pytest.raises(RuntimeError, match=r"fetch"):
            save_file(state, tmp_path / "again.safetensors")
        with pytest.raises(RuntimeError, match=r"streamed.*close\(\)"):
            streamed.load_state_dict(make_net(layers=3).state_dict())
        with pytest.raises(RuntimeError, match=r"cannot be written to"):
            nn.init.zeros_(streamed.layers[2].mlp[0].weight)


def test_a_compiled_module_is_refused() -> None:
    with pytest.raises(ValueError, match="compile it, or its layers, afterwards"):
        wsm.stream(torch.compile(linear(), backend="eager"), device="cpu")


def test_quantised_parameters_are_refused() -> None:
    class Quantised(torch.Tensor):
        pass

    module = linear()
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantised))
    with pytest.raises(ValueError, match=r"'weight' is a .*Quantised: only plain tensors"):
        wsm.stream(module, device="cpu", device_memory=MIB, host_memory=MIB)

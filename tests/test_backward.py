"""Backward through streamed weights gives the gradients of the resident module, bit for bit."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint
from waits import LIMIT_S

import wsm_ext as wsm

MIB = 1 << 20
LAYER = 7 * MIB
# Arenas of three units, and of no more than one: then every node waits for its unit.
WIDE = {"device_memory": 3 * LAYER, "host_memory": 8 * MIB, "home_bytes": 0}
NARROW = {**WIDE, "lookahead_units": 0, "arena_bytes": LAYER}
MIXED = {"device_memory": 4 * LAYER, "host_memory": 14 * MIB}


def budgets(chosen: dict[str, Any]) -> dict[str, Any]:
    config = {k: v for k, v in chosen.items() if k not in ("device_memory", "host_memory")}
    return {
        "device_memory": chosen["device_memory"],
        "host_memory": chosen["host_memory"],
        "config": {"chunk_mb": 1.0, "poison": True, **config},
    }


@pytest.fixture(scope="module")
def net() -> Net:
    made = make_net(layers=6)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def folder(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(net, tmp_path_factory.mktemp("net"))


@pytest.fixture
def resident(net: Net, device: torch.device) -> Any:
    yield net.to(device)
    net.to("cpu")


def open_(
    net: Net, folder: Path, device: torch.device, chosen: dict[str, Any], **more: Any
) -> wsm.StreamedModule:
    return wsm.stream(on_meta(net, layers=6), folder, device=device, **budgets(chosen), **more)


def hidden(device: torch.device, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 384, generator=generator).to(device).requires_grad_()


def same_gradients(
    run: Callable[[Any, torch.Tensor], torch.Tensor], streamed: Any, resident: Any, passes: int = 3
) -> None:
    """`run` makes a scalar out of a net and an input; its gradients must agree."""
    device = next(resident.parameters()).device
    for number in range(passes):
        x, y = hidden(device, number), hidden(device, number)
        run(streamed, x).backward()
        run(resident, y).backward()
        assert y.grad is not None
        assert y.grad.abs().sum() > 0
        assert torch.equal(x.grad, y.grad), number
        nothing_is_held(streamed)


def nothing_is_held(streamed: Any) -> None:
    assert wsm.handle(streamed).session.swapper.seam.idle


def through_layers(net: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in net.layers:
        x = layer(x)
    return net.head(net.norm(x)).square().sum()


@pytest.mark.parametrize("chosen", [WIDE, NARROW, MIXED], ids=["wide", "narrow", "mixed"])
@pytest.mark.parametrize("units", ["layer", "group", "leaf"])
def test_gradients_of_inputs(
    chosen: dict[str, Any], units: str, resident: Net, folder: Path, device: torch.device
) -> None:
    with open_(resident, folder, device, chosen, units=units) as streamed:
        same_gradients(through_layers, streamed, resident)


def checkpointed(reentrant: bool, segment: int) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        layers = list(net.layers)
        for start in range(0, len(layers), segment):
            part = nn.Sequential(*layers[start : start + segment])
            x = checkpoint(part, x, use_reentrant=reentrant)
        return net.head(net.norm(x)).square().sum()

    return run


@pytest.mark.parametrize("chosen", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("segment", [1, 3])
@pytest.mark.parametrize("units", ["layer", "leaf"])
def test_gradient_checkpointing(
    chosen: dict[str, Any],
    reentrant: bool,
    segment: int,
    units: str,
    resident: Net,
    folder: Path,
    device: torch.device,
) -> None:
    with open_(resident, folder, device, chosen, units=units) as streamed:
        same_gradients(checkpointed(reentrant, segment), streamed, resident, passes=2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_inside_a_unit(
    reentrant: bool, resident: Net, folder: Path, device: torch.device
) -> None:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in net.layers:
            own = layer.mlp.forward
            layer.mlp.forward = lambda h, own=own: checkpoint(own, h, use_reentrant=reentrant)
        try:
            return through_layers(net, x)
        finally:
            for layer in net.layers:
                del layer.mlp.__dict__["forward"]

    with open_(resident, folder, device, NARROW, units="layer") as streamed:
        same_gradients(run, streamed, resident, passes=2)


def test_a_checkpoint_whose_last_unit_is_not_used(
    resident: Net, folder: Path, device: torch.device
) -> None:
    """The recomputed forward ends with another unit than the one whose node asked for it."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        def segment(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            first = net.layers[1](net.layers[0](h))
            return first, net.layers[3](net.layers[2](first))

        used, _ = checkpoint(segment, x, use_reentrant=False, early_stop=False)
        return used.square().sum()

    for chosen in (NARROW, WIDE):
        with open_(resident, folder, device, chosen) as streamed:
            same_gradients(run, streamed, resident, passes=2)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    more: dict[str, list[torch.Tensor]]


class Opaque:
    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


class Wrapping(nn.Linear):
    def __init__(self, kind: str) -> None:
        super().__init__(384, 384)
        self.kind = kind

    def forward(self, given: Any) -> Any:
        x = unwrap(given)
        y = torch.tanh(super().forward(x)) + x
        return {
            "tensor": lambda: y,
            "tuple": lambda: (x, y),
            "dict": lambda: {"hidden": y, "x": x},
            "dataclass": lambda: Output(x, {"all": [x, y]}),
            "opaque": lambda: Opaque(y),
            "view": lambda: y.view(-1, 384)[:, :],
            "in place": lambda: x.mul(1).add_(y),
            "nested": lambda: [({"a": (x, [y])},)],
        }[self.kind]()


def unwrap(given: Any) -> torch.Tensor:
    if isinstance(given, torch.Tensor):
        return given.reshape(2, 5, 384)
    if isinstance(given, dict):
        return unwrap(given.get("hidden", given.get("a")))
    if isinstance(given, Output):
        return given.more["all"][-1]
    if isinstance(given, Opaque):
        return given.hidden
    return unwrap(given[-1])


KINDS = ["tensor", "tuple", "dict", "dataclass", "opaque", "view", "in place", "nested"]


def test_inputs_and_outputs_of_all_kinds(tmp_path: Path, device: torch.device) -> None:
    def make() -> nn.Module:
        torch.manual_seed(2)
        stack = nn.Module()
        stack.layers = nn.ModuleList(Wrapping(kind) for kind in KINDS * 2)
        return stack.requires_grad_(False)

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        given: Any = x
        for layer in net.layers:
            given = layer(given)
            if isinstance(given, torch.Tensor):
                given.mul_(0.5)  # what a module gives may be changed in place
        return unwrap(given).square().sum()

    resident = make().to(device)
    save(make(), tmp_path)
    with torch.device("meta"):
        empty = make()
    chosen = budgets({"device_memory": 2 * MIB, "host_memory": MIB, "home_bytes": 0})
    chosen["config"]["chunk_mb"] = 0.125
    if device.type == "cuda":
        chosen["device_memory"] = 20 * MIB
    with wsm.stream(empty, tmp_path, device=device, **chosen) as streamed:
        same_gradients(run, streamed, resident, passes=2)


def test_units_called_twice_skipped_and_nested(
    resident: Net, folder: Path, device: torch.device
) -> None:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = net.layers[0](x)
        for index in (3, 0, 3, 1):
            y = net.layers[index](y) + x
        with torch.no_grad():
            y = y + net.layers[4](y)
        return (y + net.layers[2](x)).square().sum()

    for units in (["layers.0", "layers.3.mlp"], "leaf"):
        with open_(resident, folder, device, NARROW, units=units) as streamed:
            same_gradients(run, streamed, resident)


def test_a_second_backward_and_parts_of_a_graph(
    resident: Net, folder: Path, device: torch.device
) -> None:
    with open_(resident, folder, device, NARROW) as streamed:
        grads = []
        for net in (streamed, resident):
            x = hidden(device)
            middle = net.layers[1](net.layers[0](x))
            end = net.layers[3](net.layers[2](middle)).sum()
            found = [torch.autograd.grad(end, middle, retain_graph=True)[0] for _ in range(2)]
            found += torch.autograd.grad(end, (middle, x), retain_graph=True)
            end.backward()
            grads.append([*found, x.grad])
        for one, other in zip(*grads, strict=True):
            assert torch.equal(one, other)
        nothing_is_held(streamed)


def test_gradients_of_trainable_parts_between_units(
    resident: Net, folder: Path, device: torch.device
) -> None:
    """No input of the first layers requires grad, and nothing after the last needs its grad."""
    torch.manual_seed(0)
    scales = [nn.Parameter(torch.randn(384, device=device)) for _ in range(2)]

    def run(net: Any) -> list[torch.Tensor]:
        x = net.embed(tokens().to(device))
        x = net.layers[1](net.layers[0](x)) * scales[0]
        x = net.layers[3](net.layers[2](x)) + scales[1]
        loss = net.head(net.norm(x)).logsumexp(-1).sum()
        return list(torch.autograd.grad(loss, scales))

    with open_(resident, folder, device, WIDE) as streamed:
        for _ in range(2):
            for one, other in zip(run(streamed), run(resident), strict=True):
                assert torch.equal(one, other)
        nothing_is_held(streamed)


def test_it_streams_in_reverse_and_learns_the_order(
    resident: Net, folder: Path, device: torch.device
) -> None:
    with open_(resident, folder, device, WIDE) as streamed:
        for _ in range(4):
            through_layers(streamed, hidden(device)).backward()
        before = streamed.stats()
        for _ in range(3):
            through_layers(streamed, hidden(device)).backward()
        after = streamed.stats()
        passes = after["passes"] - before["passes"]
        # 8 units each way. What was prefetched before counts when it has come.
        most_loads = 3 * 16 + streamed.plan.lookahead_units
        assert passes == 3 * (8 + 1)  # each unit's forward is a pass: nothing encloses them
        assert after["totals"]["loads"] - before["totals"]["loads"] <= most_loads
        assert after["totals"]["misses"] - before["totals"]["misses"] <= 3 * 2


def test_an_error_in_backward_lets_go_of_everything(
    resident: Net, folder: Path, device: torch.device
) -> None:
    with open_(resident, folder, device, NARROW) as streamed:
        x = hidden(device)
        middle = streamed.layers[1](streamed.layers[0](x))
        loss = streamed.layers[2](middle).sum()
        middle.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        done = threading.Thread(target=lambda: streamed.layers[5](x.detach()))
        done.start()
        done.join(LIMIT_S)
        assert not done.is_alive()
        nothing_is_held(streamed)
        same_gradients(through_layers, streamed, resident, passes=1)


def test_what_a_backward_cannot_use_is_an_error(
    resident: Net, folder: Path, device: torch.device
) -> None:
    streamed = open_(resident, folder, device, NARROW)
    x = hidden(device)
    with pytest.raises(RuntimeError, match=r"create_graph.*'layers\.0'.*not supported"):
        torch.autograd.grad(streamed.layers[0](x).sum(), x, create_graph=True)
    nothing_is_held(streamed)
    # What left a unit by another way than its outputs: autograd finds that the weights are gone.
    inner: list[torch.Tensor] = []
    handle = streamed.layers[0].mlp.register_forward_hook(
        lambda module, args, out: inner.append(out)
    )
    streamed.layers[1](streamed.layers[0](x))
    handle.remove()
    with pytest.raises(RuntimeError, match="version"):
        inner[0].sum().backward()
    loss = streamed.layers[0](x).sum()
    streamed.resize(device_memory=LAYER * 4)
    with pytest.raises(RuntimeError, match="closed or resized"):
        loss.backward()
    loss = streamed.layers[0](x).sum()
    streamed.close()
    with pytest.raises(RuntimeError, match="closed or resized"):
        loss.backward()


def test_what_left_a_unit_by_another_way_may_be_used_beside_its_outputs(
    resident: Net, folder: Path, device: torch.device
) -> None:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        inner: list[torch.Tensor] = []
        handles = [
            layer.mlp.register_forward_hook(lambda module, args, out: inner.append(out))
            for layer in net.layers
        ]
        loss = through_layers(net, x) + sum(out.square().sum() for out in inner)
        for handle in handles:
            handle.remove()
        return loss

    with open_(resident, folder, device, NARROW) as streamed:
        same_gradients(run, streamed, resident, passes=2)


def test_what_leaves_a_checkpoint_by_another_way(
    resident: Net, folder: Path, device: torch.device
) -> None:
    """Hooks have packed it, so no version is compared: the unit must be there."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        inner: list[torch.Tensor] = []
        handle = net.layers[2].mlp.register_forward_hook(
            lambda module, args, out: inner.append(out)
        )
        checkpoint(net.layers[2], x, use_reentrant=False)
        handle.remove()
        net.layers[4](x)
        return inner[0].square().sum()

    with open_(resident, folder, device, NARROW) as streamed:
        same_gradients(run, streamed, resident, passes=2)


def test_the_base_is_frozen(resident: Net, folder: Path, device: torch.device) -> None:
    with open_(resident, folder, device, MIXED) as streamed:
        placed = [p for p in streamed.parameters() if type(p) is nn.Parameter]
        absent = [p for p in streamed.parameters() if type(p) is not nn.Parameter]
        assert placed
        assert absent
        for chosen in (placed, absent):
            for parameter in chosen:
                parameter.requires_grad_(True)
            with pytest.raises(RuntimeError, match=r"requires grad.*frozen"):
                through_layers(streamed, hidden(device)).backward()
            with torch.no_grad():
                through_layers(streamed, hidden(device))
            for parameter in chosen:
                parameter.requires_grad_(False)
            nothing_is_held(streamed)
        same_gradients(through_layers, streamed, resident, passes=1)


def test_a_graph_that_is_dropped_keeps_nothing(
    resident: Net, folder: Path, device: torch.device
) -> None:
    with open_(resident, folder, device, WIDE) as streamed:
        for _ in range(3):
            through_layers(streamed, hidden(device))
        gc.collect()
        nothing_is_held(streamed)
        same_gradients(through_layers, streamed, resident, passes=1)


def test_a_backward_inside_a_forward(net: Net, folder: Path) -> None:
    """On the CPU it runs on the same thread, inside the same pass."""

    class Inner(nn.Module):
        def __init__(self, net: Any) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.detach().requires_grad_()
            self.net.layers[2](self.net.layers[0](y)).square().sum().backward()
            assert y.grad is not None
            return self.net.layers[1](y.grad + x)

    with open_(net, folder, torch.device("cpu"), NARROW) as streamed:
        same_gradients(lambda net, x: Inner(net)(x).square().sum(), streamed, net, passes=2)

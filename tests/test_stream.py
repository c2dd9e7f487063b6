"""A streamed module gives the bits of the resident one, whatever the budgets."""

from __future__ import annotations

import functools
import gc
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Net, make_net, on_meta, save, tokens
from torch import nn
from waits import LIMIT_S, wait_for_engines_to_end

import wsm_ext as wsm
from wsm_ext.modules.placeholder import StreamedParameter
from wsm_ext.runtime import outside_reads, parameter_swapper

MIB = 1 << 20
LAYER = 7 * MIB  # of float32, a little more than it is
MODEL = 64 * MIB
CHUNK = {"chunk_mb": 1.0}

BUDGETS: dict[str, dict[str, Any]] = {
    "disk": {
        "device_memory": 3 * LAYER,
        "host_memory": 8 * MIB,
        "config": {"home_bytes": 0, "staging_mb": 8},
    },
    "cache": {
        "device_memory": 3 * LAYER,
        "host_memory": MODEL + 8 * MIB,
        "config": {"home_bytes": 0},
    },
    "mixture": {"device_memory": 4 * LAYER, "host_memory": 14 * MIB, "config": {"staging_mb": 4}},
    "two_units": {
        "device_memory": 3 * LAYER,
        "host_memory": 8 * MIB,
        "config": {"home_bytes": 0, "arena_bytes": 2 * LAYER},
    },
    "uring": {"device_memory": 3 * LAYER, "host_memory": 8 * MIB, "config": {"reader": "uring"}},
    "uring_direct": {
        "device_memory": 3 * LAYER,
        "host_memory": 8 * MIB,
        "config": {"reader": "uring", "direct": "on"},
    },
    "pread": {"device_memory": 3 * LAYER, "host_memory": 8 * MIB, "config": {"reader": "pread"}},
    "pread_direct": {
        "device_memory": 3 * LAYER,
        "host_memory": 8 * MIB,
        "config": {"reader": "pread", "direct": "on"},
    },
    "buffered": {"device_memory": 3 * LAYER, "host_memory": 8 * MIB, "config": {"direct": "off"}},
    "resident": {"device_memory": 2 * MODEL, "host_memory": 8 * MIB, "config": {}},
}


def options(name: str, **config: Any) -> dict[str, Any]:
    chosen = dict(BUDGETS[name])
    chosen["config"] = {**CHUNK, "poison": True, **chosen["config"], **config}
    return chosen


def uring_works() -> bool:
    from wsm_ext import _engine

    return bool(_engine.built_with_uring)


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net()


@pytest.fixture(scope="module")
def folder(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(net, tmp_path_factory.mktemp("net"), shards=3)


def expected(net: nn.Module, device: torch.device, x: torch.Tensor) -> torch.Tensor:
    resident = net.to(device)
    try:
        with torch.inference_mode():
            return resident(x.to(device)).cpu()
    finally:
        net.to("cpu")


def check(streamed: nn.Module, net: nn.Module, device: torch.device, passes: int = 5) -> None:
    for index in range(passes):
        x = tokens(1 + index % 3, 5 + 7 * (index % 4), seed=index)
        with torch.inference_mode():
            assert torch.equal(streamed(x.to(device)).cpu(), expected(net, device, x)), index


@pytest.mark.parametrize("name", BUDGETS)
def test_bits_are_those_of_the_resident_module(
    name: str, device: torch.device, net: Net, folder: Path
) -> None:
    if name.startswith("uring") and not uring_works():
        pytest.skip("built without liburing")
    with wsm.stream(on_meta(net), folder, device=device, **options(name)) as streamed:
        check(streamed, net, device)
        plan = streamed.plan
        if name == "disk":
            assert plan.disk_home_bytes == plan.model_bytes
        if name == "cache":
            assert plan.host_home_bytes == plan.model_bytes
        if name == "mixture":
            assert min(plan.device_home_bytes, plan.host_home_bytes, plan.disk_home_bytes) > 0
        if name == "two_units":
            assert plan.lookahead_units == 1
        if name == "resident":
            assert not plan.streams
        if name in ("uring_direct", "pread_direct", "buffered"):
            readers = streamed.stats()["readers"].values()
            assert {r["mode"] for r in readers} == {"buffered" if name == "buffered" else "direct"}
        if name in ("uring_direct", "pread_direct"):
            assert {r["reader"] for r in readers} == {name.split("_")[0]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("units", ["layer", "group", "leaf", ["layers.0", "layers.3.mlp", "head"]])
def test_dtypes_and_units(
    dtype: torch.dtype, units: Any, device: torch.device, tmp_path: Path
) -> None:
    net = make_net(dtype=dtype)
    save(net, tmp_path, odd=True)
    budgets = options("mixture")
    with wsm.stream(
        on_meta(net, dtype=dtype), tmp_path, device=device, units=units, **budgets
    ) as s:
        check(s, net, device, passes=3)


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("odd", [False, True])
def test_shards_and_odd_offsets(
    shards: int, odd: bool, device: torch.device, net: Net, tmp_path: Path
) -> None:
    save(net, tmp_path, shards=shards, odd=odd)
    with wsm.stream(on_meta(net), tmp_path, device=device, **options("disk")) as streamed:
        check(streamed, net, device, passes=2)


class Packed(nn.Module):
    """Weights that are no floats of torch's default: they must pass through untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Parameter(torch.zeros(999, 33, dtype=torch.int8), requires_grad=False)
        self.tiny = nn.Parameter(torch.zeros(777, 31).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.small.float().sum() + self.tiny.float().sum()


def test_int8_and_fp8_pass_through_untouched(device: torch.device, tmp_path: Path) -> None:
    torch.manual_seed(5)
    net = nn.ModuleDict({"layers": nn.ModuleList(Packed() for _ in range(4))})
    net["layers"][0].small.data.random_(-128, 128)
    for layer in net["layers"]:
        layer.small.data = torch.randint(-128, 128, (999, 33), dtype=torch.int8)
        layer.tiny.data = torch.randn(777, 31).to(torch.float8_e4m3fn)
    save(net, tmp_path)
    with torch.device("meta"):
        empty = nn.ModuleDict({"layers": nn.ModuleList(Packed() for _ in range(4))})
    config = {"home_bytes": 0, "poison": True}
    with wsm.stream(
        empty, tmp_path, device=device, device_memory=24 * MIB, host_memory=256 << 10, config=config
    ) as streamed:
        assert streamed.plan.units[0].streamed_bytes > 0
        for name, parameter in net.named_parameters():
            assert torch.equal(
                streamed.fetch(name).cpu().view(torch.uint8), parameter.view(torch.uint8)
            )
        x = torch.ones(2, device=device)
        for layer, resident in zip(streamed["layers"], net["layers"], strict=True):
            with torch.inference_mode():
                assert torch.equal(layer(x), resident.to(device)(x))


def test_tied_weights_are_one_image(device: torch.device, tmp_path: Path) -> None:
    net = make_net(tied=True)
    save(net, tmp_path)
    with wsm.stream(
        on_meta(net, tied=True), tmp_path, device=device, **options("disk")
    ) as streamed:
        check(streamed, net, device, passes=2)
        total = sum(p.numel() * p.element_size() for p in net.parameters())
        assert streamed.plan.model_bytes == total


@pytest.mark.parametrize("name", ["disk", "cache", "mixture", "resident"])
def test_weights_that_the_module_holds_in_ram(name: str, device: torch.device, net: Net) -> None:
    own = make_net()
    objects = dict(own.named_parameters())
    with wsm.stream(own, device=device, **options(name)) as streamed:
        check(streamed, net, device, passes=3)
        assert streamed.stats()["totals"]["disk_bytes"] == 0
        if name in ("cache", "resident"):
            assert all(parameter.numel() == 0 for parameter in objects.values())
    for key, parameter in net.named_parameters():
        assert own.get_parameter(key) is objects[key]
        assert torch.equal(objects[key], parameter)
    with torch.inference_mode():
        assert torch.equal(own(tokens()), net(tokens()))


def test_layers_skipped_repeated_and_reversed(device: torch.device, net: Net, folder: Path) -> None:
    class Reordered(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.order = list(range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.inner.embed(x)
            for index in self.order:
                x = self.inner.layers[index](x)
            return self.inner.head(self.inner.norm(x))

    resident = Reordered(net)
    with wsm.stream(on_meta(net), folder, device=device, **options("disk")) as streamed:
        orders = [range(8), reversed(range(8)), [0, 0, 3, 3, 3], [7, 1], [2, 5, 2, 5, 2], range(8)]
        reordered = Reordered(streamed)
        for order in orders:
            resident.order = reordered.order = list(order)
            check(reordered, resident, device, passes=2)


def test_steady_passes_read_what_lives_on_the_disk(net: Net, folder: Path) -> None:
    with wsm.stream(on_meta(net), folder, device="cpu", **options("mixture")) as streamed:
        with torch.inference_mode():
            for _ in range(3):
                streamed(tokens())
            before = streamed.stats()["totals"]
            for _ in range(10):
                streamed(tokens())
        after = streamed.stats()["totals"]
        # What is read ahead at either end may differ by less than a pass.
        passes = (after["disk_bytes"] - before["disk_bytes"]) / streamed.plan.disk_home_bytes
        assert 9 <= passes <= 11


def test_close_leaves_the_module_as_it_was_found(net: Net, folder: Path) -> None:
    module = on_meta(net)
    parameters = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    streamed = wsm.stream(module, folder, device="cpu", **options("disk"))
    assert "forward" in module.layers[0].__dict__
    assert type(module.layers[0].self_attn.weight) is not nn.Parameter
    assert streamed is module
    assert type(module) is not Net
    handle = wsm.handle(module)
    streamed.close()
    handle.close()
    assert type(module) is Net
    assert dict(module.named_parameters()) == parameters
    for name, buffer in module.named_buffers():
        assert buffer is buffers[name]
    for inner in module.modules():
        assert "forward" not in inner.__dict__
    with pytest.raises(RuntimeError, match="closed"):
        handle.fetch("head.weight")
    with wsm.stream(module, folder, device="cpu", **options("cache")) as again:
        check(again, net, torch.device("cpu"), passes=1)


def test_everything_resident_leaves_no_wrapper(net: Net, folder: Path) -> None:
    with wsm.stream(on_meta(net), folder, device="cpu", **options("resident")) as streamed:
        assert all("forward" not in inner.__dict__ for inner in streamed.modules())
        assert streamed.plan.arena_bytes == 0


def test_buffers_are_right(net: Net, folder: Path, device: torch.device) -> None:
    with wsm.stream(on_meta(net), folder, device=device, **options("disk")) as streamed:
        for name, buffer in net.named_buffers():
            found = streamed.get_buffer(name)
            assert found.device.type == device.type
            assert torch.equal(found.cpu(), buffer)


@pytest.mark.filterwarnings("ignore:parameter .* was read outside of a forward")
def test_a_parameter_read_outside_its_forward_is_a_copy(net: Net, folder: Path) -> None:
    wanted = net.layers[2].self_attn.weight
    with wsm.stream(on_meta(net), folder, device="cpu", **options("disk")) as streamed:
        weight = streamed.layers[2].self_attn.weight
        assert weight.shape == wanted.shape
        assert weight.dtype == torch.float32
        assert isinstance(weight, nn.Parameter)
        for read in (
            lambda w: w + 1,
            lambda w: w.sum(),
            lambda w: w.data + 1,
            lambda w: torch.from_numpy(w.detach().numpy().copy()),
            lambda w: torch.tensor(w.tolist()),
            lambda w: w[0],
            lambda w: torch.nn.functional.linear(torch.ones(1, 384), w),
        ):
            with torch.no_grad():
                assert torch.equal(read(weight), read(wanted))
        state = streamed.state_dict()["layers.2.mlp.0.bias"]
        assert torch.equal(state.clone(), net.layers[2].mlp[0].bias)
        reads = streamed.stats()["outside_reads"]
        assert reads["count"] == 8
        assert reads["bytes"] == 7 * wanted.nbytes + net.layers[2].mlp[0].bias.nbytes
        for touch in (weight.data_ptr, weight.untyped_storage, weight.__dlpack__):
            with pytest.raises(RuntimeError, match="fetch"):
                touch()
        assert torch.equal(streamed.fetch("layers.2.self_attn.weight"), wanted)
        with pytest.raises(KeyError, match="nothing"):
            streamed.fetch("nothing")


def test_the_first_read_outside_is_warned_of(net: Net, folder: Path) -> None:
    with wsm.stream(on_meta(net), folder, device="cpu", **options("disk")) as streamed:
        with pytest.warns(UserWarning, match=r"'layers.2.self_attn.weight' .* read outside"):
            streamed.layers[2].self_attn.weight.sum()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            streamed.layers[3].self_attn.weight.sum()


@pytest.mark.filterwarnings("ignore:parameter .* was read outside of a forward")
def test_a_walk_over_all_parameters_does_not_fetch_the_model(
    net: Net, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside_reads, "MOST_BYTES", 4 << 20)
    with wsm.stream(on_meta(net), folder, device="cpu", **options("disk")) as streamed:
        with pytest.raises(
            RuntimeError, match=r"one operation would fetch \d+ streamed parameters"
        ):
            torch._foreach_norm(list(streamed.parameters()))
        assert streamed.stats()["outside_reads"]["count"] == 0
        norms = torch._foreach_norm(list(streamed.norm.parameters()))
        with torch.no_grad():
            assert torch.equal(norms[0], torch._foreach_norm(list(net.norm.parameters()))[0])


@pytest.mark.filterwarnings("ignore:parameter .* was read outside of a forward")
@pytest.mark.parametrize("then", ["read", "pass"])
def test_a_write_into_what_was_read_outside_is_found(then: str, net: Net, folder: Path) -> None:
    with wsm.stream(on_meta(net), folder, device="cpu", **options("disk")) as streamed:
        weight = streamed.layers[2].self_attn.weight
        with torch.no_grad():
            weight[0].zero_()
            with pytest.raises(RuntimeError, match=r"'layers.2.self_attn.weight' was written to"):
                weight.sum() if then == "read" else streamed(tokens())
            assert torch.equal(streamed(tokens()), net(tokens()))
        with pytest.raises(ValueError, match="read-only"):
            weight.detach().numpy()[0] = 1


# -- weights that a user sets ----------------------------------------------------------------------


def set_parameter(layer: nn.Module, value: torch.Tensor) -> None:
    layer.self_attn.weight = nn.Parameter(value, requires_grad=False)


def set_data(layer: nn.Module, value: torch.Tensor) -> None:
    layer.self_attn.weight.data = value


def set_by_vector(layer: nn.Module, value: torch.Tensor) -> None:
    nn.utils.vector_to_parameters(value.reshape(-1), [layer.self_attn.weight])


@pytest.mark.parametrize("budget", ["disk", "two_units", "resident"])
@pytest.mark.parametrize("how", [set_parameter, set_data, set_by_vector])
def test_a_weight_that_a_user_sets_is_used_and_left(how: Any, budget: str, folder: Path) -> None:
    resident, value = make_net(), torch.randn(384, 384, generator=torch.Generator().manual_seed(9))
    resident.requires_grad_(False)
    how(resident.layers[2], value.clone())
    chosen = dict(options("disk" if budget == "resident" else budget))
    if budget == "resident":
        chosen["device_memory"] = "256MiB"
    module = on_meta(resident).requires_grad_(False)
    with wsm.stream(module, folder, device="cpu", **chosen) as streamed:
        how(streamed.layers[2], value.clone())
        for _ in range(2):
            assert torch.equal(streamed(tokens()), resident(tokens()))
        with torch.no_grad():
            assert torch.equal(streamed.layers[2].self_attn.weight + 0, value)
        if budget != "resident":
            assert streamed.stats()["memory"]["user_bytes"] == value.nbytes
    if how is set_parameter or budget != "resident":
        assert torch.equal(module.layers[2].self_attn.weight, value)


def test_a_parameter_set_for_one_call_streams_again_afterwards(net: Net, folder: Path) -> None:
    value = torch.randn(384, 384, generator=torch.Generator().manual_seed(9))
    own = {"layers.2.self_attn.weight": value}
    chosen = options("disk")
    with wsm.stream(on_meta(net), folder, device="cpu", **chosen) as streamed, torch.no_grad():
        found = torch.func.functional_call(streamed, own, (tokens(),))
        assert torch.equal(found, torch.func.functional_call(net, own, (tokens(),)))
        assert torch.equal(streamed(tokens()), net(tokens()))


def test_a_write_in_place_to_what_stays_on_the_device_is_refused(net: Net, folder: Path) -> None:
    with wsm.stream(on_meta(net), folder, device="cpu", **options("mixture")) as streamed:
        kept = [p for p in streamed.parameters() if type(p) is nn.Parameter]
        assert kept
        with torch.no_grad():
            assert torch.equal(streamed(tokens()), net(tokens()))
            kept[0].add_(1)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="stays on the device, was written to in"):
                    streamed(tokens())


def test_conversions_inside_a_forward_are_refused_at_every_budget(net: Net, folder: Path) -> None:
    for budget in ("disk", "mixture"):
        with wsm.stream(on_meta(net), folder, device="cpu", **options(budget)) as streamed:
            norm = streamed.layers[2].input_layernorm
            hook = norm.register_forward_pre_hook(lambda norm, _: norm.to(torch.float64))
            with torch.no_grad():
                with pytest.raises(RuntimeError, match=r"cannot be changed by to\(\)"):
                    streamed(tokens())
                hook.remove()
                assert torch.equal(streamed(tokens()), net(tokens()))


# -- torch's function transforms -------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad", "jacrev"])
def test_function_transforms(transform: str) -> None:
    def linears() -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]).requires_grad_(False)

    run = {
        "vmap": lambda m, x: torch.vmap(m)(x[None]),
        "jvp": lambda m, x: torch.func.jvp(m, (x,), (x + 1,))[1],
        "grad": lambda m, x: torch.func.grad(lambda v: m(v).square().sum())(x),
        "jacrev": lambda m, x: torch.func.jacrev(lambda v: m(v).sum(0))(x),
    }[transform]
    config = {"poison": True, "arena_bytes": 64 << 10, "home_bytes": 0}
    resident, x = linears(), torch.randn(3, 64)
    with wsm.stream(linears(), device="cpu", units="layer", config=config) as streamed:
        assert streamed.plan.streams
        for _ in range(2):
            assert torch.equal(run(streamed, x), run(resident, x))


def test_tracing_is_refused(net: Net, folder: Path) -> None:
    with wsm.stream(on_meta(net), folder, device="cpu", **options("disk")) as streamed:
        with pytest.raises(RuntimeError, match=r"torch.jit.trace\(\) of a streamed module"):
            torch.jit.trace(streamed, (tokens(),))
        assert torch.equal(streamed(tokens()), net(tokens()))


def test_an_exception_in_forward_leaves_nothing_acquired(
    net: Net, folder: Path, device: torch.device
) -> None:
    with wsm.stream(on_meta(net), folder, device=device, **options("two_units")) as streamed:
        layer = streamed.layers[3]
        handle = layer.mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            check(streamed, net, device, passes=1)
        handle.remove()
        assert type(layer.self_attn.weight) is StreamedParameter
        check(streamed, net, device, passes=2)


def test_two_threads_take_turns(net: Net, folder: Path, device: torch.device) -> None:
    want = expected(net, device, tokens())
    wrong: list[Any] = []
    with wsm.stream(on_meta(net), folder, device=device, **options("disk")) as streamed:

        def run() -> None:
            with torch.inference_mode():
                for _ in range(4):
                    if not torch.equal(streamed(tokens().to(device)).cpu(), want):
                        wrong.append("bits")

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        assert not any(thread.is_alive() for thread in threads)
        assert streamed.stats()["passes"] == 8
    assert not wrong


def test_two_models_at_once(net: Net, folder: Path, device: torch.device) -> None:
    other = make_net(seed=9)
    own = make_net(seed=9)
    with (
        wsm.stream(on_meta(net), folder, device=device, **options("disk")) as one,
        wsm.stream(own, device=device, **options("cache")) as two,
    ):
        for _ in range(2):
            check(one, net, device, passes=1)
            check(two, other, device, passes=1)


def test_deletion_without_close(net: Net, folder: Path) -> None:
    module = wsm.stream(on_meta(net), folder, device="cpu", **options("disk"))
    check(module, net, torch.device("cpu"), passes=1)  # it keeps what it needs
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    wait_for_engines_to_end()


def test_a_stream_of_a_stream_is_an_error(net: Net, folder: Path) -> None:
    streamed = wsm.stream(on_meta(net), folder, device="cpu", **options("disk"))
    with streamed, pytest.raises(ValueError, match="already"):
        wsm.stream(streamed, folder, device="cpu")


def test_names_are_those_of_the_module(net: Net, folder: Path) -> None:
    with wsm.stream(on_meta(net), folder, device="cpu", **options("disk")) as streamed:
        names = [name for name, _ in streamed.named_parameters()]
        assert names == [name for name, _ in net.named_parameters()]
        with pytest.raises(AttributeError, match="missing"):
            _ = streamed.missing


class TestMismatches:
    """What does not fit is an error that names it, before anything is allocated."""

    def test_missing_surplus_shape_dtype(self, net: Net, tmp_path: Path) -> None:
        cases = {
            "layers.7.mlp.0.weight is not in the checkpoint": lambda t: t.pop(
                "layers.7.mlp.0.weight"
            ),
            "extra.weight": lambda t: t.update({"extra.weight": torch.zeros(3)}),
            "head.weight has shape": lambda t: t.update({"head.weight": torch.zeros(3, 3)}),
            "norm.weight is torch.float32, the checkpoint's .* is torch.float16": lambda t: (
                t.update({"norm.weight": t["norm.weight"].half()})
            ),
        }
        from safetensors.torch import save_file

        for number, (message, spoil) in enumerate(cases.items()):
            tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            spoil(tensors)
            file = tmp_path / f"{number}.safetensors"
            save_file(tensors, file)
            with pytest.raises(wsm.CheckpointError, match=message):
                wsm.stream(on_meta(net), file, device="cpu", **options("disk"))

    def test_a_buffer_on_meta_that_nothing_supplies(self, net: Net, folder: Path) -> None:
        module = on_meta(net)
        module.layers[1]._buffers["steps"] = torch.empty(4, device="meta")
        with pytest.raises(ValueError, match=r"layers\.1\.steps"):
            wsm.stream(module, folder, device="cpu", **options("disk"))

    def test_meta_without_a_checkpoint(self, net: Net) -> None:
        with pytest.raises(ValueError, match=r"embed\.weight.*checkpoint"):
            wsm.stream(on_meta(net), device="cpu", **options("disk"))

    @pytest.mark.parametrize("memory", ["device_memory", "host_memory"])
    def test_a_budget_too_small_names_the_least(self, memory: str, net: Net, folder: Path) -> None:
        arguments = {"device_memory": "60MiB", "host_memory": "20MiB", memory: "40KiB"}
        with pytest.raises(ValueError, match="at least") as refused:
            wsm.stream(on_meta(net), folder, device="cpu", **arguments)
        assert any(character.isdigit() for character in str(refused.value))

    def test_devices(self, net: Net, folder: Path) -> None:
        with pytest.raises(ValueError, match="mps"):
            wsm.stream(on_meta(net), folder, device="mps")
        if not torch.cuda.is_available():
            with pytest.raises(wsm.EngineError, match="device='cpu'"):
                wsm.stream(on_meta(net), folder, device="cuda")


def test_auto_budgets_need_no_arguments(net: Net, folder: Path, device: torch.device) -> None:
    with wsm.stream(on_meta(net), folder, device=device) as streamed:
        check(streamed, net, device, passes=2)


def test_stats_have_what_users_ask_for(net: Net, folder: Path, device: torch.device) -> None:
    with wsm.stream(on_meta(net), folder, device=device, **options("mixture")) as streamed:
        check(streamed, net, device, passes=3)
        stats = streamed.stats()
        assert stats["passes"] == 3
        memory = stats["memory"]
        assert 0 < memory["device_bytes"] <= memory["device_budget_bytes"] == 4 * LAYER
        assert 0 < memory["host_pinned_bytes"] <= memory["host_budget_bytes"] == 14 * MIB
        assert set(stats["last_pass"]["stall_seconds"]) == {"disk", "h2d", "arena"}
        assert stats["last_pass"]["seconds"] > 0
        assert stats["last_pass"]["h2d_bytes"] > 0
        assert stats["totals"]["disk_bytes"] >= stats["last_pass"]["disk_bytes"]
        assert stats["totals"]["disk_read_bytes"] >= stats["totals"]["disk_bytes"]
        assert len(stats["readers"]) == 3
        assert str(folder.resolve()) in next(iter(stats["readers"]))


def test_close_while_another_thread_is_in_a_pass(
    net: Net, folder: Path, device: torch.device
) -> None:
    failed: list[str] = []
    started = threading.Event()
    module = on_meta(net)
    handle = wsm.handle(wsm.stream(module, folder, device=device, **options("disk")))

    def run() -> None:
        try:
            with torch.inference_mode():
                # Between two passes it may be closed too: then the module is on meta again.
                while not module(tokens().to(device)).is_meta:
                    started.set()
        except RuntimeError as error:
            failed.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(LIMIT_S)
    handle.close()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert len(failed) == 1
    assert "closed" in failed[0]
    for inner in module.modules():
        assert "forward" not in inner.__dict__
    assert all(parameter.is_meta for parameter in module.parameters())
    assert handle.stats()["passes"] > 0


def test_a_module_that_freezes_its_attributes_streams(net: Net, folder: Path) -> None:
    class Frozen(type(net.norm)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            raise AttributeError(f"no {name} of yours")

    module = on_meta(net)
    module.norm.__class__ = Frozen
    with wsm.stream(module, folder, device="cpu", **options("disk")) as streamed:
        assert torch.equal(streamed(tokens(1, 4)), net(tokens(1, 4)))
    assert "forward" not in module.norm.__dict__


def test_a_failure_half_way_leaves_the_module_as_it_was(
    net: Net, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap = parameter_swapper.wrap_unit

    def fail_at_the_norm(module: Any, *rest: Any) -> None:
        if module is streamed.norm:
            raise RuntimeError("not this one")
        wrap(module, *rest)

    monkeypatch.setattr(parameter_swapper, "wrap_unit", fail_at_the_norm)
    streamed = on_meta(net)
    found = {name: id(parameter) for name, parameter in streamed.named_parameters()}
    with pytest.raises(RuntimeError, match="not this one"):
        wsm.stream(streamed, folder, device="cpu", **options("disk"))
    assert {name: id(parameter) for name, parameter in streamed.named_parameters()} == found
    assert all("forward" not in inner.__dict__ for inner in streamed.modules())
    assert all(buffer.device.type == "cpu" for buffer in streamed.buffers())
    assert not hasattr(streamed, "_wsm_streamed")


def test_settings_stay_when_it_is_closed(net: Net, folder: Path) -> None:
    module = on_meta(net)
    with wsm.stream(module, folder, device="cpu", **options("disk")) as streamed:
        streamed.setting = 1
    assert module.setting == 1


def test_a_parameter_that_is_not_contiguous_keeps_its_strides() -> None:
    own = make_net()
    weight = own.head.weight
    weight.data = weight.detach().t().contiguous().t()
    stride = weight.stride()
    assert stride != make_net().head.weight.stride()
    with wsm.stream(own, device="cpu", **options("cache")) as streamed:
        check(streamed, make_net(), torch.device("cpu"), passes=1)
    assert own.head.weight is weight
    assert weight.stride() == stride
    assert torch.equal(weight, make_net().head.weight)


def test_progress_ends_with_all_that_stays(net: Net, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    chosen = options("resident")
    with wsm.stream(on_meta(net), folder, device="cpu", progress=progress, **chosen) as streamed:
        total = streamed.plan.device_home_bytes
    assert told[-1] == (total, total)
    assert all(done <= total for done, _ in told)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_warning_is_told_once(net: Net, folder: Path) -> None:
    chosen = options("two_units", lookahead_units=5)
    with pytest.warns(UserWarning, match="lookahead_units = 5"):
        streamed = wsm.stream(on_meta(net), folder, device="cpu", **chosen)
    with streamed:
        told = [text for text in streamed.stats()["warnings"] if "lookahead_units" in text]
        assert len(told) == 1


class Recurrent(nn.Module):
    """As torch's recurrent modules on a GPU: the forward joins the weights in memory of its own."""

    def __init__(self, change: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.change = change
        for layer in self.layers:
            layer.forward = functools.partial(self.joined, layer)

    def joined(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        layer.weight.data = layer.weight.detach().clone() + self.change
        return F.linear(x, layer.weight, layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def streamed_recurrent(change: float) -> Any:
    torch.manual_seed(3)
    module = Recurrent(change).requires_grad_(False)
    config = {"poison": True, "arena_bytes": 64 << 10, "home_bytes": 0}
    return wsm.stream(module, device="cpu", units="layer", config=config)


def test_weights_that_a_forward_moves_in_memory_stream_on() -> None:
    torch.manual_seed(3)
    resident, x = Recurrent(0.0).requires_grad_(False), torch.randn(2, 64)
    with torch.no_grad(), streamed_recurrent(0.0) as streamed:
        for _ in range(3):
            assert torch.equal(streamed(x), resident(x))


def test_other_data_during_a_forward_is_refused_and_undone() -> None:
    torch.manual_seed(3)
    resident, x = Recurrent(0.0).requires_grad_(False), torch.randn(2, 64)
    with torch.no_grad(), streamed_recurrent(0.0) as streamed:
        streamed.change = 1.0
        with pytest.raises(wsm.EngineError, match=r"'layers.0' was written to, or given other"):
            streamed(x)
        streamed.change = 0.0
        assert torch.equal(streamed(x), resident(x))


def test_a_write_in_place_during_a_forward_is_refused_and_undone(net: Net, folder: Path) -> None:
    def write(norm: nn.Module, *_: object) -> None:
        assert isinstance(norm.weight, torch.Tensor)
        with torch.no_grad():
            norm.weight.add_(1.0)

    with wsm.stream(on_meta(net), folder, device="cpu", **options("disk")) as streamed:
        norm = streamed.layers[2].input_layernorm
        hook = norm.register_forward_hook(write)
        with torch.no_grad():
            with pytest.raises(wsm.EngineError, match="was written to, or given other data"):
                streamed(tokens())
            hook.remove()
            assert torch.equal(streamed(tokens()), net(tokens()))

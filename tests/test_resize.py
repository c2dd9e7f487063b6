"""Other budgets between passes: the same bits, and what stays is not loaded again."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens
from waits import LIMIT_S, is_inside, wait_until

import wsm_ext as wsm
from wsm_ext.planning import device_memory
from wsm_ext.runtime import session

MIB = 1 << 20
LAYER = 7 * MIB
SETTINGS = {"chunk_mb": 1.0}


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net()


@pytest.fixture(scope="module")
def folder(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(net, tmp_path_factory.mktemp("net"), shards=3)


def streamed_net(
    net: Net, folder: Path | None, device: torch.device, poison: bool = True, **budgets: Any
) -> Any:
    module = on_meta(net) if folder else net
    config = {**SETTINGS, "poison": poison}
    return wsm.stream(module, folder, device=device, config=config, **budgets)


def check(streamed: Any, net: Net, device: torch.device, seed: int = 0) -> None:
    x = tokens(2, 5, seed=seed)
    expected = net.to(device)(x.to(device)).cpu()
    net.to("cpu")
    assert torch.equal(streamed(x.to(device)).cpu(), expected)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def test_more_device_memory_loads_only_what_is_new(
    device: torch.device, net: Net, folder: Path
) -> None:
    budgets = {"device_memory": "30MiB", "host_memory": "90MiB"}
    # Poison would make units that live in the arena load again.
    with streamed_net(net, folder, device, poison=False, **budgets) as streamed:
        check(streamed, net, device)
        before, resident = streamed.plan.device_home_bytes, resident_bytes(streamed)
        read = streamed.stats()["totals"]["disk_bytes"]
        streamed.resize(device_memory="38MiB")
        after = streamed.plan.device_home_bytes
        assert after > before
        # What became resident is read. What streams is in the host cache already, but for what had
        # a home before, or the arena to itself.
        now = resident_bytes(streamed)
        left = sum(nbytes for name, nbytes in resident.items() if name not in now)
        alone = before - sum(resident.values())
        for seed in range(3):
            check(streamed, net, device, seed)
        assert streamed.stats()["totals"]["disk_bytes"] - read <= after + left + alone
        assert streamed.stats()["passes"] == 4
        assert streamed.plan.device_budget_bytes == 38 * MIB


def test_a_resize_while_units_are_prefetched(device: torch.device, net: Net, folder: Path) -> None:
    """Nothing is copied to memory that was let go."""
    for _ in range(4):
        budgets = {"device_memory": "30MiB", "host_memory": "16MiB"}
        with streamed_net(net, folder, device, **budgets) as streamed:
            streamed.resize(device_memory="38MiB")
            check(streamed, net, device)


def test_homes_that_stay_keep_their_memory(net: Net, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(device_memory, "allocate", allocate := _Allocations())
    cpu = torch.device("cpu")
    with streamed_net(net, folder, cpu, device_memory="36MiB", host_memory="90MiB") as streamed:
        names = [name for name, _ in net.named_parameters()]
        resident = {n for n in names if not _is_absent(streamed, n)}
        places = {n: net_parameter(streamed, n).data_ptr() for n in resident}
        allocate.sizes.clear()
        streamed.resize(host_memory="60MiB")
        assert {n for n in names if not _is_absent(streamed, n)} == resident
        assert {n: net_parameter(streamed, n).data_ptr() for n in resident} == places
        assert len(allocate.sizes) == 1  # the arena
        check(streamed, net, cpu)


class _Allocations:
    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._allocate = device_memory.allocate

    def __call__(self, nbytes: int, device: torch.device) -> torch.Tensor:
        self.sizes.append(nbytes)
        return self._allocate(nbytes, device)


def net_parameter(streamed: Any, name: str) -> torch.Tensor:
    return streamed.get_parameter(name)


def resident_bytes(streamed: Any) -> dict[str, int]:
    found = streamed.named_parameters()
    return {n: p.nbytes for n, p in found if type(p) is torch.nn.Parameter}


def _is_absent(streamed: Any, name: str) -> bool:
    return type(net_parameter(streamed, name)) is not torch.nn.Parameter


def test_shrink_gives_device_memory_back(device: torch.device, net: Net, folder: Path) -> None:
    with streamed_net(net, folder, device, device_memory="60MiB", host_memory="90MiB") as streamed:
        check(streamed, net, device)
        before = streamed.stats()["memory"]["device_bytes"]
        streamed.shrink("10MiB")
        assert streamed.stats()["memory"]["device_bytes"] <= before - 10 * MIB
        check(streamed, net, device)
        with pytest.raises(ValueError, match="too small"):
            streamed.shrink("30MiB")
        with pytest.raises(ValueError, match="in all"):
            streamed.shrink("1GiB")
        check(streamed, net, device)


def test_what_a_new_plan_warns_of_points_at_who_asked(net: Net, folder: Path) -> None:
    config = {**SETTINGS, "lookahead_units": 5}
    chosen = {"device_memory": "30MiB", "host_memory": "20MiB", "units": "layer"}
    with pytest.warns(UserWarning, match="lookahead_units = 5") as caught:
        streamed = wsm.stream(on_meta(net), folder, device="cpu", config=config, **chosen)
    with streamed:
        with pytest.warns(UserWarning, match="lookahead_units = 5") as shrunk:
            streamed.shrink("1MiB")
        with pytest.warns(UserWarning, match="lookahead_units = 5") as resized:
            streamed.resize(host_memory="30MiB")
    assert {warning.filename for warning in [*caught, *shrunk, *resized]} == {__file__}


def test_host_memory_grows_and_shrinks(device: torch.device, net: Net, folder: Path) -> None:
    with streamed_net(net, folder, device, device_memory="30MiB", host_memory="20MiB") as streamed:
        check(streamed, net, device)
        for size in ("50MiB", "12MiB", "90MiB", "20MiB"):
            streamed.resize(host_memory=size)
            memory = streamed.stats()["memory"]
            assert memory["host_bytes"] <= memory["host_budget_bytes"]
            check(streamed, net, device)
        assert streamed.plan.disk_home_bytes > 0


def test_everything_fits_and_then_no_more(device: torch.device, net: Net, folder: Path) -> None:
    with streamed_net(net, folder, device, device_memory="30MiB", host_memory="20MiB") as streamed:
        streamed.resize(device_memory="200MiB")
        assert not streamed.plan.streams
        assert "forward" not in streamed.layers[0].__dict__
        check(streamed, net, device)
        streamed.resize(device_memory="30MiB")
        assert streamed.plan.streams
        check(streamed, net, device)


def test_finer_units_of_tied_weights_are_found_later(tmp_path: Path) -> None:
    """When all fits, the units of other modes are not looked at before the first resize."""
    net = make_net(layers=2, hidden=1024, tied=True)
    save(net, tmp_path)
    module = on_meta(net, layers=2, hidden=1024, tied=True)
    budgets = {"device_memory": "200MiB", "host_memory": "16MiB"}
    with wsm.stream(module, tmp_path, device="cpu", **budgets) as streamed:
        streamed.resize(device_memory="24MiB")
        assert len(streamed.plan.units) > 5
        assert streamed.plan.model_bytes == sum(p.nbytes for p in net.parameters())
        assert torch.equal(streamed(tokens()), net(tokens()))


def test_random_budgets_one_after_another(device: torch.device, net: Net, folder: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    chosen = random.Random(seed)
    with streamed_net(net, folder, device, device_memory="30MiB", host_memory="20MiB") as streamed:
        for step in range(8):
            streamed.resize(
                device_memory=chosen.randrange(24, 50) * MIB,
                host_memory=chosen.randrange(4, 90) * MIB,
            )
            check(streamed, net, device, step)
        streamed.close()
        assert all(parameter.is_meta for parameter in streamed.parameters())


def test_weights_from_ram_are_put_back_and_moved_again() -> None:
    net, cpu = make_net(), torch.device("cpu")
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    resident = make_net()
    with streamed_net(net, None, cpu, device_memory="30MiB", host_memory="90MiB") as streamed:
        check(streamed, resident, cpu)
        streamed.resize(device_memory="50MiB")
        check(streamed, resident, cpu)
    for name, value in net.state_dict().items():
        assert torch.equal(value, kept[name]), name


def test_what_cannot_be_planned_changes_nothing(net: Net, folder: Path) -> None:
    cpu = torch.device("cpu")
    with streamed_net(net, folder, cpu, device_memory="30MiB", host_memory="20MiB") as streamed:
        plan = streamed.plan
        for budgets in ({"device_memory": "1MiB"}, {"host_memory": "10KiB"}):
            with pytest.raises(ValueError, match="too small"):
                streamed.resize(**budgets)
        with pytest.raises(ValueError, match="device_memory"):
            streamed.resize(device_memory="much")
        assert streamed.plan is plan
        check(streamed, net, cpu)
        handle = wsm.handle(streamed)
    with pytest.raises(RuntimeError, match="closed"):
        handle.resize(device_memory="50MiB")


def test_not_inside_a_forward(net: Net, folder: Path) -> None:
    cpu = torch.device("cpu")
    with streamed_net(net, folder, cpu, device_memory="30MiB", host_memory="20MiB") as streamed:
        seen: list[str] = []

        def hook(*_: Any) -> None:
            with pytest.raises(RuntimeError, match="between passes"):
                streamed.resize(device_memory="50MiB")
            seen.append("asked")

        handle = streamed.layers[2].mlp.register_forward_hook(hook)
        check(streamed, net, cpu)
        handle.remove()
        assert seen == ["asked"]


class TellsWhoWaits:
    """A stream's seam, but it tells when somebody is about to wait for the end of a pass."""

    def __init__(self, streamed: Any, waiting: threading.Event) -> None:
        self._seam, self._waiting = wsm.handle(streamed).session.swapper.seam, waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seam, name)

    def between(self) -> Any:
        self._waiting.set()
        return self._seam.between()


def test_waits_for_the_pass_of_another_thread(net: Net, folder: Path) -> None:
    cpu = torch.device("cpu")
    with streamed_net(net, folder, cpu, device_memory="30MiB", host_memory="20MiB") as streamed:
        inside, waiting, go_on = threading.Event(), threading.Event(), threading.Event()
        order: list[str] = []

        def hook(*_: Any) -> None:
            inside.set()
            assert go_on.wait(LIMIT_S)
            order.append("forward")

        def resize() -> None:
            streamed.resize(device_memory="50MiB")
            order.append("resize")

        handle = streamed.layers[2].mlp.register_forward_hook(hook)
        passing = threading.Thread(target=lambda: streamed(tokens(1, 3)))
        passing.start()
        assert inside.wait(LIMIT_S)
        resizing = threading.Thread(target=resize)
        wsm.handle(streamed).session.swapper.seam = TellsWhoWaits(streamed, waiting)
        resizing.start()
        assert waiting.wait(LIMIT_S)
        go_on.set()
        passing.join(LIMIT_S)
        resizing.join(LIMIT_S)
        handle.remove()
        assert order == ["forward", "resize"]
        check(streamed, net, cpu)


def test_close_while_a_resize_waits(net: Net, folder: Path) -> None:
    cpu = torch.device("cpu")
    streamed = streamed_net(net, folder, cpu, device_memory="30MiB", host_memory="20MiB")
    handle = wsm.handle(streamed)
    engine = handle.session.engine
    inside, waiting, go_on = threading.Event(), threading.Event(), threading.Event()
    raised: list[str] = []

    def hook(*_: Any) -> None:
        inside.set()
        assert go_on.wait(LIMIT_S)

    def forward() -> None:
        with pytest.raises(wsm.EngineError, match="closed"):
            streamed(tokens(1, 3))

    def resize() -> None:
        with pytest.raises(RuntimeError, match="closed") as error:
            streamed.resize(device_memory="50MiB")
        raised.append(str(error.value))

    streamed.layers[2].mlp.register_forward_hook(hook)
    wsm.handle(streamed).session.swapper.seam = TellsWhoWaits(streamed, waiting)
    threads = [threading.Thread(target=work) for work in (forward, resize, streamed.close)]
    threads[0].start()
    assert inside.wait(LIMIT_S)
    threads[1].start()
    assert waiting.wait(LIMIT_S)
    threads[2].start()
    wait_until(lambda: engine.closed, "the close")
    go_on.set()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert len(raised) == 1
    assert all(parameter.is_meta for parameter in streamed.parameters())
    assert handle.stats()["memory"]["device_budget_bytes"] == 30 * MIB


def test_two_threads_close_at_once(net: Net, folder: Path) -> None:
    cpu = torch.device("cpu")
    streamed = streamed_net(net, folder, cpu, device_memory="30MiB", host_memory="20MiB")
    handle = wsm.handle(streamed)
    give_back, held, go_on = (
        handle.session.restore_ram_parameters,
        threading.Event(),
        threading.Event(),
    )
    raised: list[BaseException] = []

    def held_once() -> None:
        if not held.is_set():
            held.set()
            assert go_on.wait(LIMIT_S)
        give_back()

    def close() -> None:
        try:
            handle.close()
        except BaseException as error:
            raised.append(error)

    handle.session.restore_ram_parameters = held_once
    threads = [threading.Thread(target=close) for _ in range(2)]
    threads[0].start()
    assert held.wait(LIMIT_S)
    threads[1].start()
    wait_until(
        lambda: is_inside(threads[1], "lifecycle.py") or not threads[1].is_alive(),
        "the second close",
    )
    go_on.set()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert raised == []
    assert not hasattr(streamed, "_wsm_streamed")


def test_a_resize_that_fails_leaves_the_module_closed(
    device: torch.device, net: Net, folder: Path, monkeypatch: Any
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no more")

    with streamed_net(net, folder, device, device_memory="30MiB", host_memory="20MiB") as module:
        streamed = wsm.handle(module)
        check(module, net, device)
        passes = streamed.stats()["passes"]
        monkeypatch.setattr(session, "ParameterSwapper", fail)
        with pytest.raises(OSError, match="no more"):
            streamed.resize(device_memory="50MiB")
        assert streamed.stats()["passes"] == passes
        with pytest.raises(RuntimeError, match="closed"):
            streamed.fetch("head.weight")
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not any("forward" in inner.__dict__ for inner in module.modules())
    monkeypatch.undo()
    with streamed_net(net, folder, device, device_memory="30MiB", host_memory="20MiB") as streamed:
        check(streamed, net, device)


def test_less_is_planned_where_the_device_has_less(
    net: Net, folder: Path, monkeypatch: Any
) -> None:
    real = device_memory.allocate
    taken = 0

    def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
        nonlocal taken
        if taken + nbytes > 40 * MIB:
            taken = 0
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        taken += nbytes
        return real(nbytes, device)

    monkeypatch.setattr(device_memory, "allocate", allocate)
    cpu = torch.device("cpu")
    budgets = {"device_memory": "60MiB", "host_memory": "20MiB"}
    with pytest.warns(UserWarning, match=r"the device has no 60.0 MiB .*planned again with 3"):
        streamed = streamed_net(net, folder, cpu, **budgets)
    with streamed:
        assert streamed.stats()["memory"]["device_bytes"] <= 40 * MIB
        assert any("planned again" in text for text in streamed.plan.warnings)
        check(streamed, net, cpu)


@pytest.mark.parametrize("device_memory", ["30MiB", "300MiB"], ids=["streamed", "all_stays"])
def test_out_of_memory_in_a_forward_says_what_to_do(
    net: Net, folder: Path, device_memory: str
) -> None:
    cpu = torch.device("cpu")
    budgets = {"device_memory": device_memory, "host_memory": "20MiB"}
    with streamed_net(net, folder, cpu, **budgets) as streamed:
        assert streamed.plan.streams == (device_memory == "30MiB")

        def hook(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        handle = streamed.layers[2].mlp.register_forward_hook(hook)
        with pytest.raises(torch.OutOfMemoryError, match=r"shrink\('1GiB'\)") as caught:
            streamed(tokens(1, 3))
        assert str(caught.value).count("shrink") == 1
        handle.remove()
        check(streamed, net, cpu)


def test_nothing_is_loaded_into_memory_that_a_resize_frees(
    net: Net, folder: Path, monkeypatch: Any
) -> None:
    cpu = torch.device("cpu")
    clear = device_memory.DeviceMemory.clear
    closed: list[bool] = []
    with streamed_net(net, folder, cpu, device_memory="30MiB", host_memory="20MiB") as streamed:

        def watched(memory: device_memory.DeviceMemory, device: torch.device) -> None:
            closed.append(wsm.handle(streamed).session.engine.closed)
            clear(memory, device)

        monkeypatch.setattr(device_memory.DeviceMemory, "clear", watched)
        streamed.resize(device_memory="40MiB")
        assert closed == [True]
        check(streamed, net, cpu)

"""Every setting has its effect on a stream, whether it comes as a variable or as an argument."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens
from waits import wait_until

import wsm_ext as wsm
from wsm_ext import _engine
from wsm_ext.config import VARIABLES, Config
from wsm_ext.planning import planner

MIB = 1 << 20
# Nothing stays on the device, and the disk is read in small pieces.
NO_HOMES = {"home_bytes": 0, "chunk_mb": 1.0}

# Of the plan, where these tests look for them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net()


@pytest.fixture(scope="module")
def folder(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(net, tmp_path_factory.mktemp("net"))


@pytest.fixture
def open_net(net: Net, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Streams the net under variables, arguments of `stream` and settings of `config`."""

    @contextmanager
    def opened(variables: dict[str, str], config: dict[str, Any] | None = None, **arguments: Any):
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        arguments = {"device_memory": 40 * MIB, "host_memory": 24 * MIB, **arguments}
        with wsm.stream(
            on_meta(net), folder, device="cpu", config={**NO_HOMES, **(config or {})}, **arguments
        ) as streamed:
            yield streamed

    return opened


def layer_bytes(net: Net) -> int:
    return sum(p.numel() * p.element_size() for p in net.layers[0].parameters())


def group_bytes(net: Net) -> int:
    return sum(p.numel() * p.element_size() for p in net.layers[0].mlp.parameters())


def run(streamed: wsm.StreamedModule, passes: int = 1) -> None:
    with torch.inference_mode():
        for _ in range(passes):
            streamed(tokens())


def totals(streamed: wsm.StreamedModule) -> dict[str, Any]:
    return streamed.stats()["totals"]


@dataclass
class Case:
    """A setting with two values, and what is seen of each."""

    name: str
    values: tuple[Any, Any]
    observe: Callable[[wsm.StreamedModule], Any]
    expect: Callable[[Net, Any], Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def variable(self) -> str:
        return VARIABLES[self.name]

    def text(self, value: Any) -> str:
        return str(int(value)) if isinstance(value, bool) else str(value)


def blocks(nbytes: int) -> int:
    return int(_engine.device_block_bytes(nbytes))


def read_by(streamed: wsm.StreamedModule) -> tuple[str, str]:
    run(streamed)
    (file,) = streamed.stats()["readers"].values()
    return file["reader"], file["mode"]


CASES = [
    Case("lookahead_units", (0, 3), lambda s: s.plan.lookahead_units, lambda net, n: n),
    Case(
        "max_cached_layers",
        (3, 5),
        lambda s: (s.plan.device_budget_bytes, s.stats()["memory"]["device_bytes"] > 0),
        lambda net, n: (blocks(n * layer_bytes(net)), True),
        arguments={"device_memory": "auto"},
    ),
    Case(
        "gpu_max_groups",
        (3, 5),
        lambda s: (s.plan.device_budget_bytes, "layers.0.mlp" in [u.name for u in s.plan.units]),
        lambda net, n: (blocks(n * group_bytes(net)), True),
        arguments={"device_memory": "auto"},
    ),
    Case(
        "cpu_cache_cap_layers",
        (0, 2),
        # Places in the cache are whole pages, and whole chunks of at most 1 MiB.
        lambda s: -(-s.plan.cache_bytes // layer_bytes(make_net(layers=1))),
        lambda net, n: n,
    ),
    Case(
        "cpu_cache_hwm_layers",
        (1, 2),
        lambda s: (s.plan.host_budget_bytes, s.plan.host_home_bytes > 0),
        lambda net, n: (n * layer_bytes(net), True),
        arguments={"host_memory": "auto"},
    ),
    Case(
        "cpu_prefetch_distance",
        (1, 2),
        lambda s: s.plan.read_ahead_bytes,
        lambda net, n: n * layer_bytes(net),
    ),
    Case("staging_mb", (3, 6), lambda s: s.plan.staging_bytes // MIB, lambda net, n: n),
    Case(
        "reader",
        ("pread", "uring"),
        read_by,
        lambda net, name: (name, "direct"),
        config={"direct": "on"},
    ),
    Case(
        "direct",
        ("off", "on"),
        read_by,
        lambda net, value: ("pread", "direct" if value == "on" else "buffered"),
        config={"reader": "pread"},
    ),
    Case(
        "measure", (False, True), lambda s: s.plan.predicted is not None, lambda net, value: value
    ),
]
IDS = [case.name for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("number", [0, 1])
def test_a_variable_has_its_effect(
    case: Case, number: int, net: Net, open_net: Callable[..., Any]
) -> None:
    value = case.values[number]
    if value == "uring" and not _engine.built_with_uring:
        pytest.skip("built without liburing")
    with open_net({case.variable: case.text(value)}, case.config, **case.arguments) as streamed:
        assert case.observe(streamed) == case.expect(net, value)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_an_argument_wins_over_its_variable(
    case: Case, net: Net, open_net: Callable[..., Any]
) -> None:
    wins, loses = case.values
    variables = {case.variable: case.text(loses)}
    with open_net(variables, {**case.config, case.name: wins}, **case.arguments) as streamed:
        assert case.observe(streamed) == case.expect(net, wins)


def test_every_variable_is_tried_here() -> None:
    elsewhere = {"gpu_free_guard_mb", "verbose", "verify"}
    assert {case.name for case in CASES} | elsewhere == set(VARIABLES)


# -- WSM_AGGRESSIVE_GPU_PREFETCH -------------------------------------------------------------------


def test_prefetch_of_none_loads_on_demand_alone(open_net: Callable[..., Any]) -> None:
    with open_net({"WSM_AGGRESSIVE_GPU_PREFETCH": "0"}) as streamed:
        run(streamed, passes=2)
        units = sum(1 for unit in streamed.plan.units if unit.streamed_bytes)
        counted = totals(streamed)
        assert counted["demand_loads"] == counted["loads"] == 2 * units


@pytest.mark.parametrize("ahead", [1, 3])
def test_prefetched_units_are_in_flight_before_the_first_is_asked_for(
    ahead: int, open_net: Callable[..., Any]
) -> None:
    with open_net({"WSM_AGGRESSIVE_GPU_PREFETCH": str(ahead)}) as streamed:
        wait_until(lambda: totals(streamed)["loads"] == ahead, "the prefetch")
        run(streamed)
        units = len(streamed.plan.units)
        wait_until(
            lambda: totals(streamed)["loads"] == units + ahead, "the prefetch of the next pass"
        )
        assert totals(streamed)["demand_loads"] < units


# -- device memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "prefetch", "warned"), [(3, 4, True), (5, 4, True), (6, 4, False), (7, 4, False)]
)
def test_a_prefetch_that_the_layers_do_not_hold_gets_smaller(
    layers: int, prefetch: int, warned: bool, open_net: Callable[..., Any]
) -> None:
    variables = {
        "WSM_MAX_CACHED_LAYERS": str(layers),
        "WSM_AGGRESSIVE_GPU_PREFETCH": str(prefetch),
    }
    with open_net(variables, device_memory="auto") as streamed:
        named = [text for text in streamed.plan.warnings if "WSM_AGGRESSIVE_GPU_PREFETCH" in text]
        assert bool(named) == warned
        assert all("WSM_MAX_CACHED_LAYERS" in text for text in named)
        assert streamed.plan.lookahead_units == min(prefetch, layers - 2)
        assert streamed.stats()["warnings"] == streamed.plan.warnings
        run(streamed)


def test_counted_layers_hold_what_is_resident_and_in_flight_together(
    net: Net, open_net: Callable[..., Any]
) -> None:
    variables = {"WSM_MAX_CACHED_LAYERS": "5"}
    with open_net(variables, {"home_bytes": None}, device_memory="auto") as streamed:
        plan, memory = streamed.plan, streamed.stats()["memory"]
        assert plan.device_home_bytes > 0
        assert plan.arena_bytes > 0
        assert memory["device_bytes"] <= plan.device_budget_bytes == blocks(5 * layer_bytes(net))
        run(streamed)


def test_the_smaller_of_a_size_and_a_count_is_the_limit(
    net: Net, open_net: Callable[..., Any]
) -> None:
    with open_net({"WSM_MAX_CACHED_LAYERS": "3"}, device_memory=40 * MIB) as streamed:
        assert streamed.plan.device_budget_bytes == blocks(3 * layer_bytes(net))
        assert any("WSM_MAX_CACHED_LAYERS=3" in text for text in streamed.plan.warnings)
    with open_net({"WSM_MAX_CACHED_LAYERS": "8"}, device_memory=20 * MIB) as streamed:
        assert streamed.plan.device_budget_bytes == 20 * MIB
        assert any("WSM_MAX_CACHED_LAYERS=8" in text for text in streamed.plan.warnings)


def test_counted_groups_keep_the_units_that_were_asked_for(open_net: Callable[..., Any]) -> None:
    variables = {"WSM_GPU_MAX_GROUPS": "5"}
    with open_net(variables, units="layer", device_memory="auto") as streamed:
        assert "layers.0" in [unit.name for unit in streamed.plan.units]
        assert any("WSM_GPU_MAX_GROUPS" in text for text in streamed.plan.warnings)


def test_the_guard_is_left_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def available(device: torch.device, guard: int) -> int:
        asked.append((device, guard))
        return 8 << 30

    monkeypatch.setattr(planner, "device_available", available)
    gpu = torch.device("cuda", 0)
    for variables, guard in (({}, 1024), ({"WSM_GPU_FREE_GUARD_MB": "300"}, 300)):
        config = Config.resolve(None, variables)
        budgets = planner.Budgets(gpu, "auto", "1GiB", config)
        assert asked.pop() == (gpu, guard * MIB)
        # The rest is for activations.
        assert (8 << 30) * 0.8 < budgets.device_bytes < (8 << 30) * 0.9
    planner.Budgets(gpu, "1GiB", "1GiB", config)
    assert not asked


def test_a_guard_without_an_auto_budget_is_a_warning(open_net: Callable[..., Any]) -> None:
    with open_net({"WSM_GPU_FREE_GUARD_MB": "300"}) as streamed:
        assert any("WSM_GPU_FREE_GUARD_MB=300" in text for text in streamed.plan.warnings)


def test_a_guard_is_left_free_in_ram_too(
    monkeypatch: pytest.MonkeyPatch, open_net: Callable[..., Any]
) -> None:
    monkeypatch.setattr(planner, "host_available", lambda: 100 * MIB)
    with open_net({"WSM_GPU_FREE_GUARD_MB": "60"}, device_memory="auto", host_memory=8 * MIB) as s:
        assert s.plan.device_budget_bytes == 32 * MIB


# -- host memory -----------------------------------------------------------------------------------


def test_the_high_water_mark_holds_cache_and_staging(
    net: Net, open_net: Callable[..., Any]
) -> None:
    with open_net({"WSM_CPU_CACHE_HWM_LAYERS": "2"}, host_memory="auto") as streamed:
        run(streamed, passes=2)
        limit = 2 * layer_bytes(net)
        assert streamed.plan.cache_bytes + streamed.plan.staging_bytes <= limit
        assert 0 < streamed.stats()["memory"]["host_peak_bytes"] <= limit
    variables = {"WSM_CPU_CACHE_HWM_LAYERS": "2", "WSM_CPU_CACHE_CAP_LAYERS": "3"}
    with open_net(variables, host_memory="auto") as streamed:
        assert streamed.plan.cache_bytes <= limit
        assert any("WSM_CPU_CACHE_CAP_LAYERS=3" in text for text in streamed.plan.warnings)


def test_what_the_cap_leaves_out_is_read_in_every_pass(open_net: Callable[..., Any]) -> None:
    variables = {"WSM_AGGRESSIVE_GPU_PREFETCH": "0", "WSM_CPU_PREFETCH_DISTANCE": "0"}
    read = {}
    for cap in ("0", "3"):
        variables["WSM_CPU_CACHE_CAP_LAYERS"] = cap
        with open_net(variables) as streamed:
            run(streamed, passes=2)
            before = totals(streamed)["disk_bytes"]
            run(streamed)
            read[cap] = totals(streamed)["disk_bytes"] - before
            assert read[cap] == streamed.plan.disk_home_bytes
            model = streamed.plan.model_bytes
    assert read["3"] < read["0"] == model


def test_staging_larger_than_the_budget_is_a_warning(open_net: Callable[..., Any]) -> None:
    with open_net({"WSM_STAGING_MB": "64"}, host_memory=8 * MIB) as streamed:
        assert streamed.plan.staging_bytes <= 8 * MIB
        assert streamed.plan.cache_bytes == 0
        assert any("WSM_STAGING_MB=64" in text for text in streamed.plan.warnings)
        run(streamed)


def test_reads_run_as_far_ahead_as_the_distance(net: Net, open_net: Callable[..., Any]) -> None:
    """Before the first pass nothing is used: all that is read by then was read ahead."""
    embedding = net.embed.weight.numel() * 4
    layer = layer_bytes(net)
    # The window ends with the unit in which it reaches the distance.
    for distance, ahead in ((0, 0), (1, embedding + layer), (2, embedding + 2 * layer)):
        variables = {
            "WSM_CPU_PREFETCH_DISTANCE": str(distance),
            "WSM_AGGRESSIVE_GPU_PREFETCH": "0",
            "WSM_STAGING_MB": "20",
            "WSM_CPU_CACHE_CAP_LAYERS": "0",
        }
        with open_net(variables) as streamed:
            wait_until(lambda s=streamed, n=ahead: totals(s)["disk_bytes"] == n, "the read-ahead")
            run(streamed)
            total = streamed.plan.model_bytes + ahead
            wait_until(lambda s=streamed, n=total: totals(s)["disk_bytes"] >= n, "the read-ahead")
            handle = wsm.handle(streamed)
            handle.close()  # ends the reads under way
            assert totals(handle)["disk_bytes"] == total


def test_a_distance_below_the_prefetch_is_a_warning(open_net: Callable[..., Any]) -> None:
    variables = {"WSM_CPU_PREFETCH_DISTANCE": "1", "WSM_AGGRESSIVE_GPU_PREFETCH": "3"}
    with open_net(variables) as streamed:
        assert any("WSM_CPU_PREFETCH_DISTANCE=1" in text for text in streamed.plan.warnings)


# -- the others ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "argument", "logs"), [("1", None, True), ("0", None, False), ("1", False, False)]
)
def test_verbose(
    variable: str,
    argument: bool | None,
    logs: bool,
    open_net: Callable[..., Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = {} if argument is None else {"verbose": argument}
    with open_net({"WSM_VERBOSE": variable}, config) as streamed:
        run(streamed)
    assert ("[WSM] " in capfd.readouterr().err) == logs


def test_a_ring_without_direct_reads_is_refused(open_net: Callable[..., Any]) -> None:
    variables = {"WSM_READER": "uring", "WSM_DIRECT": "0"}
    with pytest.raises(ValueError, match=r"uring.*direct"), open_net(variables):
        pass


@pytest.mark.parametrize("variable", sorted(set(VARIABLES.values())))
def test_a_variable_that_makes_no_sense_is_refused_by_name(
    variable: str, open_net: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=f"{variable}=nonsense"), open_net({variable: "nonsense"}):
        pass


def test_names_that_are_no_settings(open_net: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="lookahead_units"), open_net({}, {"lookahead_unit": 1}):
        pass
    with open_net({"WSM_STAGING_MIB": "4"}) as streamed:
        assert any("WSM_STAGING_MIB" in text for text in streamed.plan.warnings)
        assert any("WSM_STAGING_MIB" in text for text in streamed.stats()["warnings"])

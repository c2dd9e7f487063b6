"""What settings do to the planner's limits."""

import pytest

from wsm_ext.config import Config
from wsm_ext.planning.limits import choose_units, make_limits

MIB, GIB = 1 << 20, 1 << 30
LAYER, GROUP = 100 * MIB, 60 * MIB
FIELDS = (
    *("device_bytes", "host_bytes", "arena_bytes", "home_bytes", "staging_bytes", "cache_bytes"),
    *("chunk_bytes", "lookahead_units", "read_ahead_bytes"),
)


def limits(config=None, *, explicit=False, environ=None, **sizes):
    sizes = {
        "device_bytes": 10 * GIB,
        "host_bytes": 20 * GIB,
        "layer_bytes": LAYER,
        "group_bytes": GROUP,
    } | sizes
    result, warnings = make_limits(
        Config.resolve(config, environ or {}),
        explicit_device=explicit,
        explicit_host=explicit,
        **sizes,
    )
    return {name: getattr(result, name) for name in FIELDS}, warnings


def quiet(config=None, **options) -> dict:
    result, warnings = limits(config, **options)
    assert warnings == []
    return result


def warned(*parts: str, config=None, **options) -> dict:
    """The limits, where exactly one warning is expected, with these parts."""
    result, warnings = limits(config, **options)
    assert len(warnings) == 1, warnings
    for part in parts:
        assert part in warnings[0]
    return result


@pytest.mark.parametrize("explicit", [False, True])
def test_without_settings_the_budgets_alone_hold(explicit):
    assert quiet(explicit=explicit) == {
        "device_bytes": 10 * GIB,
        "host_bytes": 20 * GIB,
        "arena_bytes": None,
        "home_bytes": None,
        "staging_bytes": None,
        "cache_bytes": None,
        "chunk_bytes": None,
        "lookahead_units": None,
        "read_ahead_bytes": None,
    }


def test_warnings_of_the_settings_come_with_the_limits():
    warned("WSM_MAX_CACHE_LAYERS", environ={"WSM_MAX_CACHE_LAYERS": "3"})


def test_lookahead_zero_is_not_unset():
    assert quiet(environ={"WSM_AGGRESSIVE_GPU_PREFETCH": "0"})["lookahead_units"] == 0
    assert quiet(environ={"WSM_AGGRESSIVE_GPU_PREFETCH": "3"})["lookahead_units"] == 3


DEVICE_COUNTS = [("WSM_MAX_CACHED_LAYERS", LAYER), ("WSM_GPU_MAX_GROUPS", GROUP)]


@pytest.mark.parametrize(("variable", "size"), DEVICE_COUNTS)
def test_counts_bound_the_device_budget(variable, size):
    assert quiet(environ={variable: "3"})["device_bytes"] == 3 * size


@pytest.mark.parametrize(("variable", "size"), DEVICE_COUNTS)
def test_counts_against_an_explicit_device_budget(variable, size):
    environ = {variable: "3"}
    parts = (f"{variable}=3", "the smaller is used")
    assert warned(*parts, environ=environ, explicit=True)["device_bytes"] == 3 * size
    parts = (f"{variable}=3", "only 100.0 MiB may be used")
    for explicit in (True, False):
        result = warned(*parts, environ=environ, explicit=explicit, device_bytes=100 * MIB)
        assert result["device_bytes"] == 100 * MIB
    same = quiet(environ=environ, explicit=True, device_bytes=3 * size)
    assert same["device_bytes"] == 3 * size


@pytest.mark.parametrize(
    ("layer", "budget"),
    [
        (100, 2 * MIB),
        (MIB // 2, 2 * MIB),
        (MIB // 2 + 1, 10 * MIB),
        (5 * MIB, 10 * MIB),
        (5 * MIB + 1, 12 * MIB),
        (32 * MIB, 64 * MIB),
    ],
)
def test_counted_layers_fit_once_the_allocator_has_rounded(layer, budget):
    result = quiet({"max_cached_layers": 2}, layer_bytes=layer)
    assert result["device_bytes"] == budget


def test_of_layers_and_groups_together_the_smaller_bounds():
    both = {"max_cached_layers": 3, "gpu_max_groups": 6}
    parts = ("gpu_max_groups=6", "max_cached_layers=3 is the smaller")
    assert warned(*parts, config=both)["device_bytes"] == 3 * LAYER
    parts = ("max_cached_layers=4", "gpu_max_groups=6 is the smaller")
    assert warned(*parts, config=both | {"max_cached_layers": 4})["device_bytes"] == 6 * GROUP


@pytest.mark.parametrize(("variable", "size"), DEVICE_COUNTS)
@pytest.mark.parametrize(
    ("count", "asked", "got"), [("4", "3", 2), ("3", "3", 1), ("2", "1", 0), ("1", "3", 0)]
)
def test_a_count_below_prefetch_and_two_makes_the_prefetch_smaller(
    variable, size, count, asked, got
):
    environ = {variable: count, "WSM_AGGRESSIVE_GPU_PREFETCH": asked}
    result = warned(
        f"{variable}={count}",
        f"WSM_AGGRESSIVE_GPU_PREFETCH={asked}",
        f"{got} units are prefetched",
        environ=environ,
    )
    assert result["lookahead_units"] == got
    assert result["device_bytes"] == int(count) * size


def test_a_count_of_prefetch_and_two_is_enough():
    assert quiet({"max_cached_layers": 5, "lookahead_units": 3})["lookahead_units"] == 3
    assert quiet({"max_cached_layers": 2})["lookahead_units"] is None


def test_one_layer_alone_leaves_no_prefetch():
    assert warned("max_cached_layers=1", config={"max_cached_layers": 1})["lookahead_units"] == 0


def test_the_prefetch_counts_groups_where_these_are_the_unit():
    config = {"max_cached_layers": 2, "gpu_max_groups": 6, "lookahead_units": 4}
    assert limits(config)[0]["lookahead_units"] == 4


def test_the_guard_of_an_explicit_budget_has_no_effect():
    environ = {"WSM_GPU_FREE_GUARD_MB": "100"}
    assert Config.resolve(None, environ).gpu_free_guard_mb == 100
    quiet(environ=environ)
    warned("WSM_GPU_FREE_GUARD_MB=100", "no effect", environ=environ, explicit=True)


def test_cache_cap():
    result = quiet(environ={"WSM_CPU_CACHE_CAP_LAYERS": "5"}, explicit=True)
    assert (result["cache_bytes"], result["host_bytes"]) == (5 * LAYER, 20 * GIB)
    assert quiet({"cpu_cache_cap_layers": 0})["cache_bytes"] == 0
    result = warned(
        "cpu_cache_cap_layers=5",
        "only 300.0 MiB",
        config={"cpu_cache_cap_layers": 5},
        host_bytes=300 * MIB,
    )
    assert result["cache_bytes"] == 300 * MIB


def test_high_water_mark():
    environ = {"WSM_CPU_CACHE_HWM_LAYERS": "5"}
    assert quiet(environ=environ)["host_bytes"] == 5 * LAYER
    parts = ("WSM_CPU_CACHE_HWM_LAYERS=5", "the smaller is used")
    assert warned(*parts, environ=environ, explicit=True)["host_bytes"] == 5 * LAYER
    parts = ("WSM_CPU_CACHE_HWM_LAYERS=5", "only 300.0 MiB")
    assert warned(*parts, environ=environ, host_bytes=300 * MIB)["host_bytes"] == 300 * MIB


def test_the_cap_stays_below_the_high_water_mark():
    config = {"cpu_cache_cap_layers": 6, "cpu_cache_hwm_layers": 5}
    result = warned("cpu_cache_cap_layers=6", "only 500.0 MiB", config=config)
    assert (result["cache_bytes"], result["host_bytes"]) == (5 * LAYER, 5 * LAYER)
    assert quiet(config | {"cpu_cache_cap_layers": 5})["cache_bytes"] == 5 * LAYER


def test_staging():
    assert quiet(environ={"WSM_STAGING_MB": "64"})["staging_bytes"] == 64 * MIB
    assert quiet({"staging_mb": 300}, host_bytes=300 * MIB)["staging_bytes"] == 300 * MIB
    result = warned(
        "staging_mb=400",
        "300.0 MiB",
        "nothing is left",
        config={"staging_mb": 400},
        host_bytes=300 * MIB,
    )
    assert result["staging_bytes"] == 300 * MIB


def test_cap_and_staging_share_the_host_budget():
    config = {"cpu_cache_cap_layers": 3, "staging_mb": 64}
    result = warned("cpu_cache_cap_layers=3", "only 236.0 MiB", config=config, host_bytes=300 * MIB)
    assert (result["cache_bytes"], result["staging_bytes"]) == (236 * MIB, 64 * MIB)


def test_prefetch_distance():
    environ = {"WSM_CPU_PREFETCH_DISTANCE": "4"}
    assert quiet(environ=environ)["read_ahead_bytes"] == 4 * LAYER
    assert quiet({"cpu_prefetch_distance": 0})["read_ahead_bytes"] == 0
    assert quiet({"lookahead_units": 4}, environ=environ)["read_ahead_bytes"] == 4 * LAYER
    result = warned(
        "WSM_CPU_PREFETCH_DISTANCE=4", "the 5 units", config={"lookahead_units": 5}, environ=environ
    )
    assert (result["read_ahead_bytes"], result["lookahead_units"]) == (4 * LAYER, 5)


def test_sizes_given_as_arguments_pass_through():
    result = quiet({"arena_bytes": "1GiB", "home_bytes": 0, "chunk_mb": 0.0100})
    assert (result["arena_bytes"], result["home_bytes"]) == (GIB, 0)
    assert result["chunk_bytes"] == 8192  # whole pages


@pytest.mark.parametrize("name", ["arena_bytes", "home_bytes"])
def test_a_part_larger_than_the_device_budget_is_a_warning(name):
    warned(f"{name}=", "10.0 GiB", config={name: 11 * GIB})
    quiet({name: 10 * GIB})


@pytest.mark.parametrize(
    "name",
    ["max_cached_layers", "cpu_cache_cap_layers", "cpu_cache_hwm_layers", "cpu_prefetch_distance"],
)
def test_counts_of_layers_mean_nothing_without_layers(name):
    result = warned(f"{name}=1", "no layers", "no effect", config={name: 1}, layer_bytes=0)
    assert result == quiet()


def test_counts_of_groups_mean_nothing_without_groups():
    assert warned("no groups", config={"gpu_max_groups": 1}, group_bytes=0) == quiet()


# Units


@pytest.mark.parametrize("units", ["auto", "layer", "group", "leaf", ["a"]])
def test_units_are_kept_where_groups_are_not_counted(units):
    assert choose_units(Config.resolve(None, {}), units) == (units, [])


def test_counted_groups_make_groups_the_unit():
    config = Config.resolve(None, {"WSM_GPU_MAX_GROUPS": "4"})
    assert choose_units(config, "auto") == ("group", [])
    assert choose_units(config, "group") == ("group", [])
    for units in ("layer", "leaf", ["a"]):
        kept, warnings = choose_units(config, units)
        assert kept == units
        assert len(warnings) == 1
        assert "WSM_GPU_MAX_GROUPS=4" in warnings[0]

"""Where settings come from."""

from dataclasses import replace

import pytest

from wsm_ext.config import VARIABLES, Config


def resolve(config=None, **environ: str) -> Config:
    return Config.resolve(config, environ)


# Sources


def test_defaults():
    config = resolve()
    assert (config.reader, config.direct, config.verbose) == ("auto", "auto", False)
    assert (config.gpu_free_guard_mb, config.read_timeout_s, config.poison) == (1024, 30, False)
    assert config.lookahead_units is None
    assert set(config.sources.values()) == {"default"}
    assert config.warnings == []


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("WSM_AGGRESSIVE_GPU_PREFETCH", "0", "lookahead_units", 0),
        ("WSM_AGGRESSIVE_GPU_PREFETCH", " 3 ", "lookahead_units", 3),
        ("WSM_MAX_CACHED_LAYERS", "4", "max_cached_layers", 4),
        ("WSM_GPU_MAX_GROUPS", "5", "gpu_max_groups", 5),
        ("WSM_GPU_FREE_GUARD_MB", "0", "gpu_free_guard_mb", 0),
        ("WSM_CPU_CACHE_CAP_LAYERS", "0", "cpu_cache_cap_layers", 0),
        ("WSM_CPU_CACHE_HWM_LAYERS", "7", "cpu_cache_hwm_layers", 7),
        ("WSM_CPU_PREFETCH_DISTANCE", "8", "cpu_prefetch_distance", 8),
        ("WSM_STAGING_MB", "64", "staging_mb", 64),
        ("WSM_VERBOSE", "1", "verbose", True),
        ("WSM_VERBOSE", "0", "verbose", False),
        ("WSM_VERBOSE", "True", "verbose", True),
        ("WSM_READER", "uring", "reader", "uring"),
        ("WSM_READER", "PREAD", "reader", "pread"),
        ("WSM_READER", "auto", "reader", "auto"),
        ("WSM_MEASURE", "0", "measure", False),
        ("WSM_MEASURE", "on", "measure", True),
        ("WSM_VERIFY", "1", "verify", True),
        ("WSM_VERIFY", "sums/hashes.json", "verify", "sums/hashes.json"),
        ("WSM_DIRECT", "0", "direct", "off"),
        ("WSM_DIRECT", "1", "direct", "on"),
        ("WSM_DIRECT", "auto", "direct", "auto"),
    ],
)
def test_variables(variable, text, name, value):
    config = resolve(**{variable: text})
    assert getattr(config, name) == value
    assert config.sources[name] == "variable"
    assert [n for n, source in config.sources.items() if source != "default"] == [name]


def test_every_variable_of_the_table_is_tried_above():
    marks = test_variables.pytestmark[0].args[1]
    assert {(case[0], case[2]) for case in marks} == {(v, n) for n, v in VARIABLES.items()}


@pytest.mark.parametrize("build", [dict, lambda **given: Config(**given)])
def test_arguments_win_over_variables(build):
    config = resolve(
        build(staging_mb=32, verbose=False, lookahead_units=None),
        WSM_STAGING_MB="64",
        WSM_VERBOSE="1",
        WSM_READER="pread",
        WSM_AGGRESSIVE_GPU_PREFETCH="2",
    )
    assert (config.staging_mb, config.verbose, config.reader) == (32, False, "pread")
    assert config.sources["staging_mb"] == config.sources["verbose"] == "argument"
    assert config.sources["reader"] == "variable"
    assert config.lookahead_units == 2  # None says nothing


def test_resolving_twice_changes_nothing():
    environ = {"WSM_STAGING_MB": "64", "WSM_NONE": "1"}
    once = Config.resolve({"chunk_mb": 2}, environ)
    assert Config.resolve(once, environ) == once


def test_a_replaced_setting_is_an_argument():
    config = resolve(replace(resolve(WSM_STAGING_MB="64"), staging_mb=16), WSM_STAGING_MB="64")
    assert (config.staging_mb, config.sources["staging_mb"]) == (16, "argument")


def test_an_empty_variable_is_not_set():
    assert resolve(WSM_STAGING_MB=" ").sources["staging_mb"] == "default"


def test_the_environment_of_the_process_is_read(monkeypatch):
    monkeypatch.setenv("WSM_STAGING_MB", "48")
    assert Config.resolve().staging_mb == 48


def test_arguments_are_parsed():
    config = Config(
        arena_bytes="2GiB", home_bytes=0, chunk_mb=0.5, lookahead_units="3", direct=False
    )
    assert (config.arena_bytes, config.home_bytes, config.chunk_mb) == (2 << 30, 0, 0.5)
    assert (config.lookahead_units, config.direct) == (3, "off")


def test_settings_are_described_as_they_were_given():
    config = resolve({"staging_mb": 3, "reader": "uring"}, WSM_MAX_CACHED_LAYERS="4")
    assert config.describe("max_cached_layers") == "WSM_MAX_CACHED_LAYERS=4"
    assert config.describe("staging_mb") == "staging_mb=3"
    assert config.describe("reader") == "reader='uring'"


# What is refused


@pytest.mark.parametrize(
    ("variable", "text", "why"),
    [
        ("WSM_STAGING_MB", "much", "whole number"),
        ("WSM_STAGING_MB", "1.5", "whole number"),
        ("WSM_STAGING_MB", "0", "at least 1"),
        ("WSM_STAGING_MB", str(2**31), "below 2^31"),
        ("WSM_AGGRESSIVE_GPU_PREFETCH", "-1", "at least 0"),
        ("WSM_MAX_CACHED_LAYERS", "0", "at least 1"),
        ("WSM_GPU_MAX_GROUPS", "0", "at least 1"),
        ("WSM_CPU_CACHE_HWM_LAYERS", "0", "at least 1"),
        ("WSM_VERBOSE", "loud", "must be one of 0, 1"),
        ("WSM_READER", "mmap", "must be one of auto, uring, pread"),
        ("WSM_DIRECT", "2", "must be one of auto, 0, 1"),
    ],
)
def test_values_that_are_refused_name_the_variable(variable, text, why):
    with pytest.raises(ValueError) as error:
        resolve(**{variable: text})
    assert str(error.value).startswith(f"{variable}={text}: ")
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("staging_mb", 1.5),
        ("staging_mb", True),
        ("lookahead_units", -1),
        ("chunk_mb", 0.001),
        ("chunk_mb", 257),
        ("chunk_mb", "nan"),
        ("chunk_mb", True),
        ("read_timeout_s", 0),
        ("read_timeout_s", float("inf")),
        ("read_timeout_s", None),
        ("read_threads", 0),
        ("arena_bytes", "big"),
        ("home_bytes", -1),
        ("verbose", None),
        ("reader", "mmap"),
        ("verify", 3),
        ("verify", ""),
    ],
)
def test_values_that_are_refused_name_the_argument(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        Config(**{name: value})


def test_an_unknown_setting_is_refused_with_a_close_one():
    with pytest.raises(ValueError, match="no setting 'staging'; did you mean staging_mb"):
        resolve({"staging": 3})
    with pytest.raises(ValueError, match="no setting 'sources'"):
        resolve({"sources": {}})


def test_an_unknown_variable_is_a_warning_with_a_close_one():
    config = resolve(WSM_MAX_CACHE_LAYERS="3", PATH="x", WSM_REQUIRE_GPU="1", WSM_CUDA="OFF")
    assert len(config.warnings) == 1
    assert "WSM_MAX_CACHE_LAYERS is not a variable" in config.warnings[0]
    assert "did you mean WSM_MAX_CACHED_LAYERS" in config.warnings[0]

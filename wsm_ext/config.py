"""Settings: arguments win over environment variables, which win over defaults."""

from __future__ import annotations

import difflib
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from . import _engine
from .sizes import format_bytes, parse_bytes

_MIB = 1 << 20
_PAGE = 4096
_UNSET: Any = object()

# Variables of the build and the tests: known, but no settings.
_OTHER_VARIABLES = ("WSM_CUDA", "WSM_REQUIRE_GPU", "WSM_BUILD_DIR", "WSM_TEST_SEED")

_Parse = Callable[[Any, str], Any]


def _count(least: int) -> _Parse:
    def parse(value: Any, name: str) -> int:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = int(value) if isinstance(value, str) else operator.index(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: must be a whole number") from None
        if not least <= number < 2**31:
            raise ValueError(f"{name}: must be at least {least} and below 2^31")
        return number

    return parse


def _number(least: float, most: float) -> _Parse:
    def parse(value: Any, name: str) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not least <= number <= most:
            raise ValueError(f"{name}: must be a number from {least:g} to {most:g}")
        return number

    return parse


def _choice(names: Mapping[Any, Any]) -> _Parse:
    def parse(value: Any, name: str) -> Any:
        key = value.strip().lower() if isinstance(value, str) else str(value).lower()
        if key not in names:
            raise ValueError(f"{name}: must be one of {', '.join(names)}")
        return names[key]

    return parse


_flag = _choice({"0": False, "1": True, "off": False, "on": True, "false": False, "true": True})
_reader = _choice({"auto": "auto", "uring": "uring", "pread": "pread"})
_direct = _choice(
    {"auto": "auto", "0": "off", "1": "on", "off": "off", "on": "on", "false": "off", "true": "on"}
)


def _flag_or_path(value: Any, name: str) -> bool | str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, (bool, str)) or text == "":
        raise ValueError(f"{name}: must be True, False, or the path of a file of hashes")
    try:
        return bool(_flag(text, name))
    except ValueError:
        return str(text)


def _setting(default: Any, parse: _Parse, variable: str | None = None) -> Any:
    metadata = {"default": default, "parse": parse, "variable": variable}
    return field(default=_UNSET, metadata=metadata)


@dataclass(kw_only=True)
class Config:
    """Every tunable. None leaves the choice to the planner.

    `sources` tells for each whether it is an "argument", a "variable" or a "default"; `warnings`
    what was found in the environment that has no effect. `make_limits` passes these on.
    """

    lookahead_units: int | None = _setting(None, _count(0), "WSM_AGGRESSIVE_GPU_PREFETCH")
    max_cached_layers: int | None = _setting(None, _count(1), "WSM_MAX_CACHED_LAYERS")
    gpu_max_groups: int | None = _setting(None, _count(1), "WSM_GPU_MAX_GROUPS")
    gpu_free_guard_mb: int = _setting(1024, _count(0), "WSM_GPU_FREE_GUARD_MB")
    cpu_cache_cap_layers: int | None = _setting(None, _count(0), "WSM_CPU_CACHE_CAP_LAYERS")
    cpu_cache_hwm_layers: int | None = _setting(None, _count(1), "WSM_CPU_CACHE_HWM_LAYERS")
    cpu_prefetch_distance: int | None = _setting(None, _count(0), "WSM_CPU_PREFETCH_DISTANCE")
    staging_mb: int | None = _setting(None, _count(1), "WSM_STAGING_MB")
    verbose: bool = _setting(False, _flag, "WSM_VERBOSE")
    reader: str = _setting("auto", _reader, "WSM_READER")
    direct: str = _setting("auto", _direct, "WSM_DIRECT")
    # Measure disk, link and one layer before planning. None: when it can matter.
    measure: bool | None = _setting(None, _flag, "WSM_MEASURE")
    # Check what is loaded against the hashes of `wsm verify`; a path: where these are.
    verify: bool | str = _setting(False, _flag_or_path, "WSM_VERIFY")
    # The largest chunk: at least a page, at most a piece in which pinned memory is registered.
    chunk_mb: float | None = _setting(None, _number(_PAGE / _MIB, 256))
    arena_bytes: int | None = _setting(None, parse_bytes)
    home_bytes: int | None = _setting(None, parse_bytes)
    read_threads: int | None = _setting(None, _count(1))
    read_timeout_s: float = _setting(30.0, _number(0.001, 86400))
    # Overwrite a place in the arena the moment it is released: for tests.
    poison: bool = _setting(False, _flag)
    sources: dict[str, str] = field(default_factory=dict, init=False)
    warnings: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        for name, metadata in _SETTINGS.items():
            value = getattr(self, name)
            if value is _UNSET or (value is None and metadata["default"] is None):
                setattr(self, name, metadata["default"])
                self.sources[name] = "default"
            else:
                self._set(name, value, "argument")

    @classmethod
    def resolve(
        cls,
        config: Config | Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """Fill in from the environment what `config` leaves open."""
        environ = os.environ if environ is None else environ
        if isinstance(config, Config):
            given = {n: getattr(config, n) for n, s in config.sources.items() if s == "argument"}
        else:
            given = dict(config or {})
        for name in given:
            if name not in _SETTINGS:
                raise ValueError(f"config has no setting {name!r}{_close(name, _SETTINGS)}")
        resolved = cls(**given)
        for name, variable in VARIABLES.items():
            text = environ.get(variable, "").strip()
            if text and resolved.sources[name] == "default":
                resolved._set(name, text, "variable")
        known = [*VARIABLES.values(), *_OTHER_VARIABLES]
        for variable in sorted(environ):
            if variable.startswith("WSM_") and variable not in known:
                resolved.warnings.append(
                    f"{variable} is no variable of wsm_ext and has no effect"
                    + _close(variable, known)
                )
        return resolved

    def describe(self, name: str) -> str:
        """The setting as it was given: `WSM_STAGING_MB=64` or `staging_mb=64`."""
        return _described(name, getattr(self, name), self.sources[name])

    def set_argument(self, name: str, value: Any) -> None:
        """Set it, as an argument does."""
        self._set(name, value, "argument")

    def _set(self, name: str, value: Any, source: str) -> None:
        given = _described(name, value, source)
        setattr(self, name, _SETTINGS[name]["parse"](value, given))
        self.sources[name] = source


_SETTINGS: dict[str, Mapping[str, Any]] = {f.name: f.metadata for f in fields(Config) if f.metadata}
VARIABLES: dict[str, str] = {n: m["variable"] for n, m in _SETTINGS.items() if m["variable"]}


def choose_units(
    config: Config, units: str | Sequence[str]
) -> tuple[str | Sequence[str], list[str]]:
    """The units to use, and warnings: a budget in groups makes groups the unit."""
    if config.gpu_max_groups is None or units == "group":
        return units, []
    if units == "auto":
        return "group", []
    return units, [
        f"{config.describe('gpu_max_groups')} makes groups the unit, but units={units!r} was given:"
        " that is kept, and the groups count device memory alone"
    ]


def make_limits(
    config: Config,
    *,
    device_bytes: int,
    host_bytes: int,
    layer_bytes: int,
    group_bytes: int,
    explicit_device: bool,
    explicit_host: bool,
) -> tuple[dict[str, int | None], list[str]]:
    """The planner's limits, and warnings that say what was done with settings that disagree.

    `layer_bytes` and `group_bytes` are those of the largest one. A budget is explicit when it was
    given as a size, not as "auto".
    """
    limits = _Limits(config, layer_bytes, group_bytes, list(config.warnings))
    device = limits.device(device_bytes, explicit_device)
    lookahead = limits.lookahead()
    host, cache, staging = limits.host(host_bytes, explicit_host)
    for name in ("arena_bytes", "home_bytes"):
        limit = getattr(config, name)
        if limit is not None and limit > device:
            limits.warn(
                name, f"more than all device memory that may be used, {format_bytes(device)}"
            )
    chunk = config.chunk_mb
    return {
        "device_bytes": device,
        "host_bytes": host,
        "arena_bytes": config.arena_bytes,
        "home_bytes": config.home_bytes,
        "staging_bytes": staging,
        "cache_bytes": cache,
        "chunk_bytes": None if chunk is None else int(chunk * _MIB) // _PAGE * _PAGE,
        "lookahead_units": lookahead,
        "read_ahead_bytes": limits.read_ahead(lookahead),
    }, limits.warnings


@dataclass(frozen=True)
class ReadMethod:
    """How direct reads are made: by which reader ("auto": as suits the machine), and in blocks of
    how many bytes (0: as suits the reader)."""

    reader: str = "auto"
    block_bytes: int = 0

    def __str__(self) -> str:
        reader = "io_uring" if self.reader == "uring" else self.reader
        return f"{reader}, blocks of {format_bytes(self.block_bytes)}"


DEFAULT_READ_METHOD = ReadMethod()


def engine_options(
    config: Config, method: ReadMethod = DEFAULT_READ_METHOD
) -> _engine.EngineOptions:
    """The settings that the engine itself takes. `method`: what was measured to be the fastest."""
    options = _engine.EngineOptions()
    options.reader = getattr(_engine.ReaderChoice, config.reader)
    options.preferred = getattr(_engine.ReaderChoice, method.reader)
    options.block_bytes = method.block_bytes
    options.direct = getattr(_engine.DirectMode, config.direct)
    options.read_threads = config.read_threads or 0
    options.read_timeout_s = config.read_timeout_s
    options.poison = config.poison
    options.verbose = config.verbose
    return options


@dataclass
class _Limits:
    config: Config
    layer_bytes: int
    group_bytes: int
    warnings: list[str]

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(f"{self.config.describe(name)}: {message}")

    def size_of(self, name: str) -> int:
        return self.group_bytes if name == "gpu_max_groups" else self.layer_bytes

    def counted(self, name: str) -> int | None:
        """The bytes of a setting that counts layers or groups; None when it is not set."""
        count: int | None = getattr(self.config, name)
        if count is None:
            return None
        size = self.size_of(name)
        if size == 0:
            what = "groups" if name == "gpu_max_groups" else "layers"
            self.warn(name, f"the model has no {what}, so this has no effect")
            return None
        return count * size

    def device(self, budget: int, explicit: bool) -> int:
        counted = {n: self.counted(n) for n in ("max_cached_layers", "gpu_max_groups")}
        wanted = {n: _device_block_bytes(size) for n, size in counted.items() if size is not None}
        name = min(wanted, key=lambda n: wanted[n], default=None)
        for other in wanted.keys() - {name}:
            self.warn(other, f"{self.config.describe(str(name))} is the smaller and is used")
        if name is not None:
            self._compare(name, wanted[name], budget, explicit)
            budget = min(budget, wanted[name])
        if explicit and self.config.sources["gpu_free_guard_mb"] != "default":
            self.warn("gpu_free_guard_mb", "has no effect, because device_memory is not 'auto'")
        return budget

    def _compare(self, name: str, wanted: int, budget: int, explicit: bool) -> None:
        if wanted > budget:
            self.warn(
                name,
                f"{format_bytes(wanted)}, but only {format_bytes(budget)} may be used: that is the"
                " limit",
            )
        elif wanted < budget and explicit:
            self.warn(
                name,
                f"{format_bytes(wanted)}, less than the {format_bytes(budget)} given: the smaller"
                " is used",
            )

    def lookahead(self) -> int | None:
        """At most the count of layers, or of groups where these are the unit, less two."""
        name = "max_cached_layers" if self.config.gpu_max_groups is None else "gpu_max_groups"
        count: int | None = getattr(self.config, name)
        wanted = self.config.lookahead_units
        if count is None or not self.size_of(name) or count >= (wanted or 0) + 2:
            return wanted
        smaller = max(0, count - 2)
        asked = "" if wanted is None else f" {self.config.describe('lookahead_units')} plus"
        self.warn(name, f"less than{asked} 2: {smaller} units are prefetched")
        return smaller

    def host(self, budget: int, explicit: bool) -> tuple[int, int | None, int | None]:
        """Budget, cache and staging."""
        config = self.config
        high = self.counted("cpu_cache_hwm_layers")
        if high is not None:
            self._compare("cpu_cache_hwm_layers", high, budget, explicit)
            budget = min(budget, high)
        staging = None if config.staging_mb is None else config.staging_mb * _MIB
        if staging is not None and staging > budget:
            self.warn(
                "staging_mb",
                f"more than all host memory that may be used, {format_bytes(budget)}: that is the"
                " limit, and nothing is left for the host cache",
            )
            staging = budget
        cache = self.counted("cpu_cache_cap_layers")
        room = budget - (staging or 0)
        if cache is not None and cache > room:
            self.warn(
                "cpu_cache_cap_layers",
                f"{format_bytes(cache)}, but only {format_bytes(room)} of host memory may be used"
                " for the host cache: that is the limit",
            )
            cache = room
        return budget, cache, staging

    def read_ahead(self, lookahead: int | None) -> int | None:
        distance = self.config.cpu_prefetch_distance
        if distance is not None and lookahead is not None and distance < lookahead:
            self.warn(
                "cpu_prefetch_distance",
                f"less than the {lookahead} units prefetched to the device: what is on the disk"
                " arrives no earlier than that",
            )
        return self.counted("cpu_prefetch_distance")


def _device_block_bytes(size: int) -> int:
    """Rounded as the planner's device blocks are, so that the layers counted fit in one."""
    if size <= _MIB:
        return 2 * _MIB
    return max(10 * _MIB, -(-size // (2 * _MIB)) * 2 * _MIB)


def _described(name: str, value: Any, source: str) -> str:
    if source == "variable":
        return f"{VARIABLES[name]}={value}"
    return f"{name}={value!r}"


def _close(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=2)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""

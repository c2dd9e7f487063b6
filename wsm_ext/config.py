"""Settings: arguments win over environment variables, which win over defaults."""

from __future__ import annotations

import difflib
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .sizes import parse_bytes

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

    `sources` says for each whether it is an "argument", a "variable" or a "default"; `warnings`
    what was found in the environment that has no effect.
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
            arguments = {
                n: getattr(config, n) for n, s in config.sources.items() if s == "argument"
            }
        else:
            arguments = dict(config or {})
        for name in arguments:
            if name not in _SETTINGS:
                raise ValueError(f"config has no setting {name!r}{_close(name, _SETTINGS)}")
        resolved = cls(**arguments)
        for name, variable in VARIABLES.items():
            text = environ.get(variable, "").strip()
            if text and resolved.sources[name] == "default":
                resolved._set(name, text, "variable")
        known = [*VARIABLES.values(), *_OTHER_VARIABLES]
        for variable in sorted(environ):
            if variable.startswith("WSM_") and variable not in known:
                resolved.warnings.append(
                    f"{variable} is not a variable of wsm_ext and has no effect"
                    + _close(variable, known)
                )
        return resolved

    def describe(self, name: str) -> str:
        """The setting as it was set: `WSM_STAGING_MB=64` or `staging_mb=64`."""
        return _described(name, getattr(self, name), self.sources[name])

    def set_argument(self, name: str, value: Any) -> None:
        """Set it, as an argument does."""
        self._set(name, value, "argument")

    def _set(self, name: str, value: Any, source: str) -> None:
        described = _described(name, value, source)
        setattr(self, name, _SETTINGS[name]["parse"](value, described))
        self.sources[name] = source


_SETTINGS: dict[str, Mapping[str, Any]] = {f.name: f.metadata for f in fields(Config) if f.metadata}
VARIABLES: dict[str, str] = {n: m["variable"] for n, m in _SETTINGS.items() if m["variable"]}


def _described(name: str, value: Any, source: str) -> str:
    if source == "variable":
        return f"{VARIABLES[name]}={value}"
    return f"{name}={value!r}"


def _close(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=2)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""

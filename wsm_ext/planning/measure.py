"""Measures what a pass depends on: the disk under a checkpoint, the link to the device, and what
one layer computes. Each takes about a second; `rates` decides what is measured, and remembers.
"""

from __future__ import annotations

import inspect
import operator
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import _engine
from ..config import Config
from ..modules.units import Unit, find_units
from ..sizes import format_bytes
from .budgets import device_available
from .device_memory import allocate
from .read_method import DEFAULT_READ_METHOD, ReadMethod, engine_options

_MIB = 1 << 20
# More than most caches hold: a pass copies other bytes each time.
_SOURCE_BYTES = 256 * _MIB
_TARGET_BYTES = 64 * _MIB
_SPAN_BYTES = 16 * _MIB  # read one after another, in chunks as the engine reads them
_LEAST_CHUNK_BYTES = 64 << 10
_LEAST_SPANS = 4  # fewer are read too soon to tell anything
_MOST_READ_BYTES = 2048 * _MIB
_READ_SECONDS = 0.6
_SAMPLE_SECONDS = 0.06  # of a method of reading, if there are several
_ROUNDS = 5
_MOST_SECONDS = 2.5  # for all methods; a slow drive has fewer samples by then
# Those that have won on drives so far (docs/performance.md). A chunk is a MiB: no block is more.
_READ_METHODS = (
    *(ReadMethod("uring", _MIB // 4), ReadMethod("uring", _MIB)),
    *(ReadMethod("pread", _MIB // 4), ReadMethod("pread", _MIB)),
)
_FASTER = 1.05  # than the engine's own choice, to be worth another
_PATIENCE_S = 10
_MOST_CPU_BYTES = 4 << 30  # of two layers: more takes longer to write than all else to measure
_MOST_TOKEN_IDS = 1024  # special tokens lie above
_COMPUTE_SECONDS = 1.0
_PROBE_TOKENS = 16


NOTHING_TO_READ = f"less than {format_bytes(_LEAST_SPANS * _SPAN_BYTES)} to read"


class NotMeasuredError(Exception):
    """Something cannot be measured here; the message says why."""


# -- the link --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """A copy of n bytes takes `copy_overhead_s + n / bytes_per_s`."""

    bytes_per_s: float
    copy_overhead_s: float


def measure_link(device: torch.device) -> Link:
    """Copies of 16 MiB and of 1 MiB as the engine makes them: out of pinned memory on the copy
    stream of a GPU, from memory to memory on the host device.

    Raises NotMeasuredError if the memory for that is refused, or the device fails.
    """
    try:
        return _link_of(*_time_copies(device, [16 * _MIB, _MIB]))
    except (MemoryError, torch.cuda.OutOfMemoryError, _engine.EngineError) as error:
        raise NotMeasuredError(f"copies could not be made: {error}") from error
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what was taken here counts in no budget


def _time_copies(device: torch.device, sizes: list[int]) -> list[float]:
    target = allocate(_TARGET_BYTES, device)
    index = -1
    if device.type == "cuda":
        index = device.index
        torch.cuda.synchronize(device)  # work under way may still use what the target was before
    return _engine.time_copies(index, target.data_ptr(), _TARGET_BYTES, _SOURCE_BYTES, sizes)


def _link_of(large_s: float, small_s: float) -> Link:
    """From the seconds of a copy of 16 MiB and of one of 1 MiB."""
    if large_s <= small_s:  # noise
        return Link(16 * _MIB / large_s, 0.0)
    rate = 15 * _MIB / (large_s - small_s)
    overhead = small_s - _MIB / rate
    if overhead < 0:
        return Link(16 * _MIB / large_s, 0.0)
    return Link(rate, overhead)


# -- the disk --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """16 MiB of a file that are read one after another. `cached`: all in the page cache."""

    path: Path
    offset: int
    cached: bool


def find_spans(paths: Sequence[Path], direct: str = "auto") -> list[Span]:
    """At most 2 GiB of the files, in golden-ratio order, so that any prefix is spread evenly.

    None if they are too small to tell anything. With direct="on" nothing counts as cached: the
    page cache is not read.
    """
    starts = []
    for path in paths:
        size = path.stat().st_size
        starts += [(path, at) for at in range(0, size - _SPAN_BYTES + 1, _SPAN_BYTES)]
    if len(starts) < _LEAST_SPANS:
        return []
    count = min(len(starts), _MOST_READ_BYTES // _SPAN_BYTES)
    # By rank, so that no two are alike.
    ranks = sorted(range(len(starts)), key=lambda i: i * 0.6180339887498949 % 1)
    chosen = sorted(range(len(starts)), key=ranks.__getitem__)[:count]
    return [
        Span(path, at, direct != "on" and _cached(path, at))
        for path, at in map(starts.__getitem__, chosen)
    ]


def _cached(path: Path, offset: int) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return _engine.in_page_cache(fd, offset, _SPAN_BYTES)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Disk:
    """How fast a disk is read, and by which method."""

    bytes_per_s: float
    read_method: ReadMethod = DEFAULT_READ_METHOD


def measure_disk(spans: Sequence[Span], config: Config) -> Disk:
    """How fast the spans (all in the page cache, or none) are read: through the page cache by the
    readers that the engine would take; past it by the fastest of a few methods, tried by turns.

    Which one is the fastest differs from drive to drive, and from one virtual disk to the next. The
    engine's own choice stays if no other is faster in every round, and by 5 % in the median: on
    a drive whose samples scatter by a fifth, the best of six equal methods is the luckiest. Takes
    2.5 s, and what the last sample takes. Raises NotMeasuredError if a read fails, or there is
    nothing to read.
    """
    if not spans:
        raise NotMeasuredError(NOTHING_TO_READ)
    methods = [DEFAULT_READ_METHOD]
    if not spans[0].cached and config.direct != "off":
        methods += [method for method in _READ_METHODS if config.reader in ("auto", method.reader)]
    options = [_options_of(method, config) for method in methods]
    samples = _sample_reads(spans, options, chunk_bytes([span.path for span in spans], config))
    of_default, *others = samples
    # Rounds that all methods have had in full; else there is nothing to compare.
    compared = len(of_default) == _ROUNDS
    if not of_default:
        raise NotMeasuredError(f"there is no reader {config.reader!r} here")
    best = Disk(statistics.median(of_default))
    least = _FASTER * best.bytes_per_s
    for method, rates in zip(methods[1:], others, strict=True):
        always = compared and len(rates) == _ROUNDS and all(map(operator.gt, rates, of_default))
        if always and (rate := statistics.median(rates)) > max(least, best.bytes_per_s):
            best = Disk(rate, method)
    return best


def _options_of(method: ReadMethod, config: Config) -> _engine.EngineOptions:
    options = engine_options(config, method)
    if method.reader != "auto":  # it, or none: not another one in its place
        options.reader = options.preferred
    options.read_timeout_s = min(options.read_timeout_s, _PATIENCE_S)
    return options


def chunk_bytes(paths: Sequence[Path], config: Config) -> int:
    """What is read of the files at once, if no small budget and no huge model asks for another. A
    size that was asked for is measured up to a span's, by steps of 64 KiB."""
    if config.chunk_mb is None:
        return _engine.usual_chunk_bytes(all(_engine.lies_in_memory(str(p)) for p in set(paths)))
    whole_steps = int(config.chunk_mb * _MIB) // _LEAST_CHUNK_BYTES * _LEAST_CHUNK_BYTES
    return min(max(whole_steps, _LEAST_CHUNK_BYTES), _SPAN_BYTES)


def _sample_reads(
    spans: Sequence[Span], methods: Sequence[_engine.EngineOptions], chunk: int
) -> list[list[float]]:
    paths = list(dict.fromkeys(span.path for span in spans))
    extents = [
        _engine.FileExtent(paths.index(span.path), span.offset, _SPAN_BYTES) for span in spans
    ]
    rounds = 1 if len(methods) == 1 else _ROUNDS
    seconds = _READ_SECONDS if len(methods) == 1 else _SAMPLE_SECONDS
    try:
        files = [str(path) for path in paths]
        return _engine.time_reads(files, extents, methods, seconds, rounds, _MOST_SECONDS, chunk)
    except (OSError, MemoryError, _engine.EngineError) as error:  # a TimeoutError is an OSError
        raise NotMeasuredError(f"reading failed: {error}") from error


# -- one layer's compute ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Compute:
    """Seconds that a forward computes: each layer, and what lies outside them by unit name.

    `rest_s` is what no unit accounts for. `tokens`: as many were run, then the layer's time scaled.
    """

    layer_s: float
    others: dict[str, float]
    rest_s: float
    tokens: int


def measure_layer(module: nn.Module, device: torch.device, batch: int, tokens: int) -> Compute:
    """The compute of a transformers model at `batch` x `tokens`, from two of its layers.

    `module` is only looked at: two layers of its shape are made on the device with made-up
    weights. If a forward takes long, fewer tokens are run and the times scaled.

    Raises NotMeasuredError if the model cannot be cut to two layers, or has no room.
    """
    try:
        model = _two_layers(module, device)
        return _measure_two_layers(model, device, batch, tokens)
    except NotMeasuredError:
        raise
    except torch.cuda.OutOfMemoryError as error:
        raise NotMeasuredError("the device has not enough memory for two layers") from error
    except Exception as error:  # any model's constructor and forward
        raise NotMeasuredError(
            f"two of its layers cannot be run: {type(error).__name__}: {error}"
        ) from error
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _two_layers(module: nn.Module, device: torch.device) -> nn.Module:
    try:
        from ..hf.two_layers import TwoLayersError, build_two_layers
    except ImportError as error:
        raise NotMeasuredError("transformers is not installed") from error
    room = device_available(device, 0) // 2
    if device.type == "cpu":
        room = min(room, _MOST_CPU_BYTES)
    try:
        return build_two_layers(module, device, room)
    except TwoLayersError as error:
        raise NotMeasuredError(str(error)) from error


def _measure_two_layers(model: Any, device: torch.device, batch: int, tokens: int) -> Compute:
    units = [unit for unit in find_units(model, "layer") if not unit.encloses_units]
    if not any(unit.layer is not None for unit in units):
        raise NotMeasuredError("its layers are not found")
    parameters = inspect.signature(model.forward).parameters
    inputs = {"use_cache": False, "logits_to_keep": 1}
    inputs = {key: value for key, value in inputs.items() if key in parameters}
    vocabulary = min(model.config.get_text_config().vocab_size, _MOST_TOKEN_IDS)

    def run(count: int) -> ForwardTimes:
        ids = torch.randint(0, vocabulary, (batch, count), device=device)
        with torch.inference_mode(), _Stopwatch(units, device) as watch:
            model(input_ids=ids, **inputs)
        return watch.times()

    return _compute_of(run, units, tokens)


class ForwardTimes(NamedTuple):
    """Seconds of a whole forward, and of the units in it by name."""

    total_s: float
    by_unit: dict[str, float]


def _compute_of(run: Callable[[int], ForwardTimes], units: list[Unit], tokens: int) -> Compute:
    layers = [unit.name for unit in units if unit.layer is not None]
    count = min(tokens, _PROBE_TOKENS)
    run(count)  # warm-up
    samples = [run(count)]
    afford = int(count * _COMPUTE_SECONDS / 2 / max(samples[0].total_s, 1e-9))
    if count < tokens and afford > count:
        count = min(tokens, afford)
        samples = [run(count)]
    while len(samples) < 5 and len(samples) * samples[0].total_s < _COMPUTE_SECONDS:
        samples.append(run(count))
    total, by_unit = sorted(samples, key=lambda sample: sample.total_s)[(len(samples) - 1) // 2]
    layer = statistics.mean(by_unit[name] for name in layers)
    others = {name: seconds for name, seconds in by_unit.items() if name not in layers}
    rest = max(0.0, total - sum(by_unit.values()))
    if count < tokens:
        fewer = max(1, count // 4)
        at_fewer = run(fewer).by_unit
        layer_at_fewer = statistics.mean(at_fewer[name] for name in layers)
        layer = _extrapolated((fewer, layer_at_fewer), (count, layer), tokens)
    # What lies outside the layers hardly grows: the head sees one token of each sequence.
    return Compute(layer, others, rest, count)


def _extrapolated(fewer: tuple[int, float], more: tuple[int, float], tokens: int) -> float:
    """A part of the time is the weights' and does not grow; the rest grows with the tokens."""
    count, seconds = more
    slope = 0.0 if count == fewer[0] else (seconds - fewer[1]) / (count - fewer[0])
    return seconds + min(max(slope, 0.0), seconds / count) * (tokens - count)


class _Stopwatch:
    """Times a forward and the units in it, by hooks; on a GPU by events."""

    def __init__(self, units: list[Unit], device: torch.device) -> None:
        self._units = units
        self._device = device
        self._marks: dict[str, list[Any]] = {unit.name: [] for unit in units}
        self._whole: list[Any] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _Stopwatch:
        for unit in self._units:
            marks = self._marks[unit.name]
            note = self._noter(marks)
            self._hooks.append(unit.module.register_forward_pre_hook(note))
            self._hooks.append(unit.module.register_forward_hook(note))
        self._whole.append(self._now())
        return self

    def __exit__(self, *_: object) -> None:
        self._whole.append(self._now())
        for hook in self._hooks:
            hook.remove()

    def times(self) -> ForwardTimes:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        by_unit = {
            name: sum(self._between(a, b) for a, b in zip(marks[::2], marks[1::2], strict=True))
            for name, marks in self._marks.items()
        }
        return ForwardTimes(self._between(*self._whole), by_unit)

    def _noter(self, marks: list[Any]) -> Callable[..., None]:
        def note(*_: Any) -> None:
            marks.append(self._now())

        return note

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return float(end - begin)
        return float(begin.elapsed_time(end)) / 1000

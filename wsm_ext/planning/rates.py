"""How fast each link is, and where that is known from: measured now, before, or assumed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _engine
from ..config import Config
from ..modules.sources import Source
from ..modules.spec import unit_bytes
from ..modules.units import Unit
from ..sizes import format_bytes
from . import measure
from .measure import Compute, Disk, Link, NotMeasuredError, Span
from .measurements import Measurements, device_name, file_system, key_of
from .read_method import DEFAULT_READ_METHOD, ReadMethod
from .workload import WorkloadSize

_log = logging.getLogger("wsm_ext")

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rate:
    """Bytes per second. `source`: "measured", "cached" (measured before) or "default" (assumed).

    `entries`: under which names it is remembered.
    """

    bytes_per_s: float
    source: str
    note: str = ""
    entries: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        return self.source != "default"

    def forget(self) -> None:
        """Passes have shown that it is not so: the next start measures again."""
        if self.entries:
            Measurements().drop(self.entries)

    def as_dict(self) -> dict[str, Any]:
        """As plain data, without the names of entries."""
        return {"bytes_per_s": self.bytes_per_s, "source": self.source, "note": self.note}


@dataclass(frozen=True)
class Rates:
    """What is predicted from. `compute` is None if it is not known; `compute_note` says why."""

    disk: Rate
    h2d: Rate
    copy_overhead_s: float
    host_computes: bool  # the host device: a forward holds up the thread that calls it
    compute: Compute | None = None
    compute_source: str = "default"
    compute_note: str = "not measured"
    workload: WorkloadSize | None = None
    read_method: ReadMethod = DEFAULT_READ_METHOD  # how the disk is read the fastest

    def for_units(self, units: Sequence[Unit], source: Source) -> _engine.Rates:
        """As the engine takes them, with the compute of each unit."""
        rates = _engine.Rates()
        rates.disk_bytes_per_s = self.disk.bytes_per_s
        rates.h2d_bytes_per_s = self.h2d.bytes_per_s
        rates.copy_overhead_s = self.copy_overhead_s
        rates.host_computes = self.host_computes
        rates.compute_s = [] if self.compute is None else _by_unit(self.compute, units, source)
        return rates

    def at(self, module: nn.Module, device: torch.device, workload: WorkloadSize) -> Rates:
        """The same links, and the compute of another workload."""
        compute, source, note = compute_at(module, device, workload)
        return replace(
            self, compute=compute, compute_source=source, compute_note=note, workload=workload
        )


def _by_unit(compute: Compute, units: Sequence[Unit], source: Source) -> list[float]:
    """A layer's seconds go to its units by their bytes; what no unit has, to the first."""
    sizes = [unit_bytes(unit, source) for unit in units]
    layers: dict[tuple[str | None, int], int] = {}
    for unit, size in zip(units, sizes, strict=True):
        if unit.layer is not None:
            layer = (unit.stack, unit.layer)
            layers[layer] = layers.get(layer, 0) + size
    seconds = []
    for unit, size in zip(units, sizes, strict=True):
        if unit.layer is None:
            seconds.append(compute.others.get(unit.name, 0.0))
        else:
            seconds.append(compute.layer_s * size / max(1, layers[unit.stack, unit.layer]))
    if seconds:
        seconds[0] += compute.rest_s
    return seconds


def default_rates(device: torch.device) -> Rates:
    """Assumed, not measured: the engine's own defaults."""
    rates = _engine.Rates()
    return Rates(
        Rate(rates.disk_bytes_per_s, "default"),
        Rate(rates.h2d_bytes_per_s, "default"),
        rates.copy_overhead_s,
        device.type == "cpu",
    )


def gather(
    module: nn.Module,
    paths: Sequence[Path],
    device: torch.device,
    config: Config,
    workload: WorkloadSize | None,
) -> Rates:
    """Measure, or take what was measured in the last 30 days on this machine.

    `paths`: the checkpoint's files; none if the weights lie in RAM. `workload`: what compute is
    measured at; None leaves it out. What cannot be measured is assumed, and its note says why.
    """
    if config.measure is False:
        return default_rates(device)
    store = Measurements()
    assumed = default_rates(device)
    h2d, overhead_s = assumed.h2d, assumed.copy_overhead_s
    try:
        link, source = _link(store, device)
        h2d = Rate(link.bytes_per_s, source, entries=(_link_key(device),))
        overhead_s = link.copy_overhead_s
    except NotMeasuredError as error:
        h2d = Rate(h2d.bytes_per_s, h2d.source, str(error))
    method = DEFAULT_READ_METHOD
    try:
        disk, method = _disk(store, paths, config) if paths else (_memory(store), method)
    except NotMeasuredError as error:
        disk = Rate(assumed.disk.bytes_per_s, "default", str(error))
    compute, source, note = compute_at(module, device, workload)
    rates = Rates(
        disk, h2d, overhead_s, device.type == "cpu", compute, source, note, workload, method
    )
    _log.info(
        "disk %.2f GB/s (%s), link %.2f GB/s (%s), compute %s",
        disk.bytes_per_s / 1e9,
        disk.source,
        h2d.bytes_per_s / 1e9,
        h2d.source,
        f"{compute.layer_s * 1e3:.2f} ms a layer ({source})" if compute else note,
    )
    return rates


def compute_at(
    module: nn.Module, device: torch.device, workload: WorkloadSize | None
) -> tuple[Compute | None, str, str]:
    """The compute at a workload, its source, and why it is None."""
    if workload is None:
        return None, "default", "no workload=(sequences, tokens) was given"
    store = Measurements()
    shape = _shape_of(module)
    key = key_of(
        "compute", device_name(device), f"torch {torch.__version__}", str(tuple(workload)), shape
    )
    try:
        compute, source = _remembered(
            store,
            key,
            lambda: asdict(measure.measure_layer(module, device, *workload)),
            _as_compute,
        )
    except NotMeasuredError as error:
        return None, "default", str(error)
    return compute, source, ""


def _shape_of(module: nn.Module) -> str:
    """What decides a transformers model's compute, but the number of its layers."""
    config: Any = getattr(module, "config", None)
    text = config.to_json_string() if hasattr(config, "to_json_string") else ""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{type(module).__name__} {getattr(module, 'dtype', None)} {digest}"


def _remembered(
    store: Measurements,
    key: str,
    measure_now: Callable[[], Any],
    parse: Callable[[Any], Any],
) -> tuple[Any, str]:
    value = store.get(key)
    if value is not None:
        try:
            return parse(value), "cached"
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            _log.warning("the entry %r of the measurements is damaged: measured anew", key)
    value = measure_now()
    store.put(key, value)
    return parse(value), "measured"


def _link_key(device: torch.device) -> str:
    return key_of("link", device_name(device))


def _link(store: Measurements, device: torch.device) -> tuple[Link, str]:
    key = _link_key(device)
    return _remembered(store, key, lambda: asdict(measure.measure_link(device)), _as_link)


def _memory(store: Measurements) -> Rate:
    """The "disk" of weights that lie in RAM: copies from memory to memory."""
    link, source = _link(store, _CPU)
    return Rate(link.bytes_per_s, source, "the weights lie in RAM", (_link_key(_CPU),))


def _disk(store: Measurements, paths: Sequence[Path], config: Config) -> tuple[Rate, ReadMethod]:
    """Of what is in the page cache and what is not, each by its own rate, as the bytes divide."""
    try:
        spans = measure.find_spans(paths, config.direct)
    except OSError as error:
        raise NotMeasuredError(str(error)) from error
    if not spans:
        raise NotMeasuredError(measure.NOTHING_TO_READ)
    seconds_per_byte = 0.0
    sources = []
    entries = []
    notes = []
    method = DEFAULT_READ_METHOD
    for cached in (False, True):
        part = [span for span in spans if span.cached == cached]
        if part:
            entries.append(_disk_key(part, config))
            disk, source = _remembered(
                store, entries[-1], partial(_measure_disk, part, config), _as_disk
            )
            seconds_per_byte += len(part) / len(spans) / disk.bytes_per_s
            sources.append(source)
            if disk.read_method != DEFAULT_READ_METHOD:
                method = disk.read_method
                notes.append(str(method))
    share = sum(span.cached for span in spans) / len(spans)
    if share:
        notes.append(f"{share:.0%} in the page cache")
    source = "measured" if "measured" in sources else "cached"
    return Rate(1 / seconds_per_byte, source, ", ".join(notes), tuple(entries)), method


def remembered_read_method(paths: Sequence[Path], config: Config) -> ReadMethod:
    """How the disk under the files was found to be read the fastest; nothing is measured."""
    value = Measurements().get(key_of(_how(paths, config), *_file_systems(paths)))
    try:
        return (
            DEFAULT_READ_METHOD
            if value is None or config.measure is False
            else _as_disk(value).read_method
        )
    except (TypeError, ValueError, KeyError, OverflowError):
        return DEFAULT_READ_METHOD


def _measure_disk(spans: Sequence[Span], config: Config) -> dict[str, Any]:
    return asdict(measure.measure_disk(spans, config))


def _disk_key(spans: Sequence[Span], config: Config) -> str:
    paths = [span.path for span in spans]
    kind = "page cache, " + _chunks(paths, config) if spans[0].cached else _how(paths, config)
    return key_of(kind, *_file_systems(paths))


def _file_systems(paths: Sequence[Path]) -> list[str]:
    return sorted({file_system(path) for path in paths})


def _chunks(paths: Sequence[Path], config: Config) -> str:
    return f"chunks of {format_bytes(measure.chunk_bytes(paths, config))}"


def _how(paths: Sequence[Path], config: Config) -> str:
    threads = "" if config.read_threads is None else f", {config.read_threads} threads"
    settings = f"direct {config.direct}, reader {config.reader}{threads}"
    return f"disk ({settings}, {_chunks(paths, config)})"


def _positive(value: Any) -> float:
    rate = float(value)
    if not 1 <= rate <= 1e15:  # bytes/s of any machine
        raise ValueError
    return rate


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 <= seconds <= 1e6:
        raise ValueError
    return seconds


def _as_disk(value: Any) -> Disk:
    method = ReadMethod(value["read_method"]["reader"], int(value["read_method"]["block_bytes"]))
    if method.reader not in ("auto", "uring", "pread") or not 0 <= method.block_bytes <= 1 << 30:
        raise ValueError
    return Disk(_positive(value["bytes_per_s"]), method)


def _as_link(value: Any) -> Link:
    return Link(_positive(value["bytes_per_s"]), _seconds(value["copy_overhead_s"]))


def _as_compute(value: Any) -> Compute:
    others = {str(name): _seconds(seconds) for name, seconds in value["others"].items()}
    return Compute(
        _seconds(value["layer_s"]), others, _seconds(value["rest_s"]), int(value["tokens"])
    )

"""Where the bytes of a module's parameters come from: a checkpoint, or its own tensors in RAM.

The result is what the planner takes: shards, tensor images, and for each entry its image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .. import _engine
from .._engine import Extent, ShardSpec, TensorSpec
from ..checkpoints.arrival import Arrival, ArrivingTensor
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.image import CheckpointError, TensorImage
from ..wording import first_of
from .raw_memory import address_of, empty_in_ram
from .units import ParameterEntry, Unit

_MOST_NAMED = 10
_COMPARE_BYTES = 16 << 20


@dataclass
class RamParameter:
    """A parameter that the module holds in RAM, and its bytes, one after another.

    The bytes are those of the parameter itself, or a copy if it is not contiguous. They are let
    go when all of them are on the device or in the host cache, and put back at the end. `shared`:
    other elements, its own or another parameter's, lie in the same bytes. Then they stay, since
    what is put back would lie apart. To be let go and put back `without_modes`.
    """

    name: str
    parameter: torch.Tensor
    data: torch.Tensor | None
    size: torch.Size
    stride: tuple[int, ...]
    shared: bool = False

    @staticmethod
    def of(name: str, parameter: torch.Tensor) -> RamParameter:
        data = parameter.detach()
        plain = data.resolve_conj().resolve_neg().contiguous()
        return RamParameter(name, parameter, plain, data.size(), data.stride())

    def span(self) -> tuple[int, int]:
        """Where the parameter's own bytes begin and end."""
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        begin = self.parameter.data_ptr()
        return begin, begin + (last + 1) * self.parameter.element_size()

    def let_go(self) -> None:
        if self.shared:
            return
        self.data = None
        self.parameter.data = empty_in_ram([0], self.parameter.dtype)

    def put_back(self, fetch: Callable[[str], torch.Tensor]) -> None:
        if self.data is None:
            dtype = self.parameter.dtype
            found = torch.empty_strided(self.size, self.stride, dtype=dtype, device="cpu")
            self.parameter.data = self.data = found.copy_(fetch(self.name))


@dataclass
class Source:
    """Shards and tensor images for `_engine.plan_model`, and which entry has which image."""

    shards: list[ShardSpec] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # by shard: its address, or 0 for a file
    tensors: list[TensorSpec] = field(default_factory=list)
    index_of: dict[str, int] = field(default_factory=dict)  # entry name -> index into tensors
    arrivals: dict[int, Arrival] = field(default_factory=dict)  # by index into tensors
    kept: list[torch.Tensor] = field(default_factory=list)  # what `memory` points to besides
    # The module's own tensors by shard, if the bytes come from RAM.
    ram_parameters: dict[int, RamParameter] = field(default_factory=dict)

    @property
    def in_ram(self) -> bool:
        return bool(self.ram_parameters)


def live(entry: ParameterEntry) -> torch.Tensor:
    """The parameter that the entry holds now."""
    parameter = entry.owner._parameters[entry.key]
    assert parameter is not None
    return parameter


def names_of_parameters(module: nn.Module) -> dict[str, list[str]]:
    """By each name of a parameter: all of its names. It may be tied, or its module be there
    twice."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: together for together in names.values() for name in together}


def from_checkpoint(
    names_of: Mapping[str, list[str]], units: Iterable[Unit], checkpoint: Checkpoint
) -> Source:
    """Match every entry with its tensor by name, shape and dtype.

    A parameter may be in the checkpoint under any one of its names. If it is there under several,
    equal tensors become one image; unequal ones stay apart.

    Raises CheckpointError naming what is missing, or has another shape or dtype.
    """
    entries = [entry for unit in units for entry in unit.entries]
    chosen: dict[str, str] = {}
    problems: list[str] = []
    for entry in entries:
        known = names_of.get(entry.name, [entry.name])
        names = [name for name in known if name in checkpoint.tensors]
        if not names and entry.name in checkpoint.computed:
            continue
        if not names:
            problems.append(f"{entry.name} is not in the checkpoint")
            continue
        name = entry.name if entry.name in names else names[0]
        if name != names[0] and same_bytes(checkpoint, names[0], name):
            name = names[0]
        chosen[entry.name] = name
        problems += _mismatch(entry, checkpoint.tensors[name])
    raise_for(problems)
    source = _source_of_images(
        checkpoint, {own: checkpoint.tensors[name] for own, name in chosen.items()}
    )
    for entry in entries:
        if entry.name not in chosen:
            value = checkpoint.computed[entry.name]
            source.kept.append(value)
            source.index_of[entry.name] = _add_shard(source, entry.name, value)
    return source


def _not_plain(name: str, parameter: torch.Tensor) -> str | None:
    """Why the parameter cannot be streamed, if it is not just its bytes."""
    kind = type(parameter)
    if kind in (nn.Parameter, torch.Tensor):
        if parameter.layout == torch.strided and not parameter.is_quantized:
            return None
        return (
            f"parameter {name!r} is {parameter.layout}, {parameter.dtype}: only dense tensors that"
            " are not quantised can be streamed"
        )
    return (
        f"parameter {name!r} is a {kind.__module__}.{kind.__qualname__}: only plain tensors can be"
        " streamed. If it is quantised (torchao, bitsandbytes), stream the module as it was before"
    )


def _mismatch(entry: ParameterEntry, image: TensorImage) -> list[str]:
    parameter = live(entry)
    refused = _not_plain(entry.name, parameter)
    if refused:
        return [refused]
    problems = []
    if tuple(parameter.shape) != tuple(image.shape):
        problems.append(
            f"{entry.name} has shape {list(parameter.shape)}, the checkpoint's {image.name}"
            f" has {list(image.shape)}"
        )
    if parameter.dtype != image.dtype:
        problems.append(
            f"{entry.name} is {parameter.dtype}, the checkpoint's {image.name} is {image.dtype};"
            " build the module with the checkpoint's dtype"
        )
    return problems


def raise_for(problems: list[str]) -> None:
    """Raise CheckpointError naming them."""
    if problems:
        listed = first_of(problems, _MOST_NAMED, "\n  ")
        raise CheckpointError(f"the checkpoint does not fit the module:\n  {listed}")


def _source_of_images(checkpoint: Checkpoint, images: dict[str, TensorImage]) -> Source:
    source = Source()
    for path in checkpoint.shards:
        name = str(path)
        alignment, in_memory = _engine.direct_alignment(name), _engine.lies_in_memory(name)
        source.shards.append(ShardSpec(name, path.stat().st_size, alignment, in_memory))
        source.memory.append(0)
    seen: dict[TensorImage, int] = {}
    for slot_name, image in images.items():
        key = replace(image, name="")
        if key not in seen:
            index = seen[key] = len(source.tensors)
            parameter_bytes = 0
            if image.arrival is not None:
                source.arrivals[index] = image.arrival
                parameter_bytes = image.nbytes
            source.tensors.append(
                TensorSpec(slot_name, image.arriving_bytes, extents_of(image), parameter_bytes)
            )
        source.index_of[slot_name] = seen[key]
    return source


def extents_of(image: TensorImage) -> list[Extent]:
    """As the engine takes them."""
    return [Extent(e.shard, e.offset, e.nbytes, e.tensor_offset) for e in image.extents]


def same_bytes(checkpoint: Checkpoint, a: str, b: str) -> bool:
    one, two = checkpoint.tensors[a], checkpoint.tensors[b]
    if (one.dtype, one.shape, one.arrival) != (two.dtype, two.shape, two.arrival):
        return False
    if one.extents == two.extents:
        return True
    return all(
        x == y for x, y in zip(_blocks(checkpoint, one), _blocks(checkpoint, two), strict=True)
    )


def _blocks(checkpoint: Checkpoint, image: TensorImage) -> Iterable[bytes]:
    """The image's bytes in tensor order, cut at multiples of one block."""
    pending = bytearray()
    for extent in sorted(image.extents, key=lambda e: e.tensor_offset):
        path = str(checkpoint.shards[extent.shard])
        at, end = extent.offset, extent.offset + extent.nbytes
        while at < end:
            count = min(end - at, _COMPARE_BYTES - len(pending))
            pending += _engine.read_extent(path, at, count)
            at += count
            if len(pending) == _COMPARE_BYTES:
                yield bytes(pending)
                pending.clear()
    if pending:
        yield bytes(pending)


def from_module(units: Iterable[Unit]) -> Source:
    """The module's own tensors are the shards; tied ones are one.

    Raises ValueError naming a parameter that has no bytes (meta), or has them on another device.
    """
    source = Source()
    index: dict[int, int] = {}
    for unit in units:
        for entry in unit.entries:
            parameter = live(entry)
            if parameter.device.type != "cpu":
                raise ValueError(
                    f"parameter {entry.name!r} is on {parameter.device}: without a checkpoint,"
                    " stream() takes the weights from RAM. Give a checkpoint, or move the module to"
                    " the CPU"
                )
            if id(parameter) not in index:
                index[id(parameter)] = len(source.tensors)
                _add_memory(source, entry.name, parameter)
            source.index_of[entry.name] = index[id(parameter)]
    _mark_shared(list(source.ram_parameters.values()))
    return source


def _mark_shared(parameters: list[RamParameter]) -> None:
    spans = sorted((*held.span(), number) for number, held in enumerate(parameters))
    before, end = 0, 0  # of those until now, the one that ends last
    for begin, its_end, number in spans:
        held = parameters[number]
        held.shared |= its_end - begin < held.parameter.nbytes  # an expanded one
        if begin < end:
            held.shared = parameters[before].shared = True
        if its_end > end:
            before, end = number, its_end


def _add_memory(source: Source, name: str, parameter: torch.Tensor) -> None:
    problem = _not_plain(name, parameter)
    if problem:
        raise ValueError(problem)
    held = RamParameter.of(name, parameter)
    assert held.data is not None
    source.ram_parameters[len(source.shards)] = held
    _add_shard(source, name, held.data)


def _add_shard(source: Source, name: str, data: torch.Tensor) -> int:
    """A contiguous tensor in RAM as a shard of its own; its index among the tensors."""
    shard = len(source.shards)
    source.shards.append(ShardSpec(name, data.nbytes, in_memory=True))
    source.memory.append(address_of(data, data.nbytes))
    source.tensors.append(TensorSpec(name, data.nbytes, [Extent(shard, 0, data.nbytes)]))
    return len(source.tensors) - 1


def surplus(module: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's tensors that are neither a parameter nor a persistent buffer of the
    module."""
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        passing = owner._non_persistent_buffers_set
        keys = [key for key, _ in owner._buffers.items() if key not in passing]
        known |= {f"{prefix}.{key}" if prefix else key for key in keys}
    return sorted(set(checkpoint.tensors) - known)


def check_surplus(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError naming tensors that the module has no place for."""
    names = surplus(module, checkpoint)
    if names:
        raise CheckpointError(
            "the checkpoint has tensors that the module does not have:"
            f" {first_of(names, _MOST_NAMED)}. Is it the checkpoint of this model?"
        )


def read_tensor(
    checkpoint: Checkpoint, name: str, check: Callable[[torch.Tensor], None] | None = None
) -> torch.Tensor:
    """One small tensor (a buffer), read into RAM; `check` is given the bytes of its image."""
    image = checkpoint.tensors[name]
    tensor = empty_in_ram(image.shape, image.dtype)
    if tensor.numel() == 0:
        return tensor
    data = bytearray().join(_blocks(checkpoint, image))
    arrived = torch.frombuffer(data, dtype=torch.uint8).clone()
    if check is not None:
        check(arrived)
    arrival = image.arrival or Arrival((ArrivingTensor(0, image.dtype, image.shape),))
    arrival.write(arrived, tensor)
    return tensor

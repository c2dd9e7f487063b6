"""Puts parameters into the module just before its forward, and takes them out after it.

The engine decides when bytes are on the device, and the seam in C++ what stands in the module's
entries. Here the parameters over device memory are made, and the placeholders that stand in for
them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from .. import _engine
from ..checkpoints.arrival import Arrival
from ..modules.dynamo import never_compiled
from ..modules.placeholder import StreamedParameter
from ..modules.raw_memory import address_of, empty_in_ram, without_modes
from ..modules.sources import Source, live
from ..modules.spec import unit_tensors
from ..modules.tensor_tree import addresses_of, map_tensors, tensors_in
from ..modules.units import Unit
from ..planning.device_memory import DeviceMemory
from .arrivals import ArrivingParameter, UnitArrivals
from .integrity import Checker, Image, UnitCheck
from .outside_reads import OutsideReads
from .seam import current_task, make_seam
from .wrapped_forwards import wrap_ancestors, wrap_unit


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter over device memory; `absent`: what stands for it while its unit is away."""

    unit: int
    tensor: int  # of the unit's
    entries: dict[str, Any]  # its module's parameters
    key: str  # its own in them
    found: torch.Tensor  # what was there at first; tied parameters have the same
    placed: nn.Parameter
    absent: StreamedParameter | None  # None: it has a home on the device

    @property
    def is_ours(self) -> bool:
        """Whether nobody has set another parameter in its stead."""
        now = self.entries.get(self.key)
        return now is self.placed or (now is not None and now is self.absent)

    @property
    def to_be_trained(self) -> bool:
        return self.placed.requires_grad or (self.absent is not None and self.absent.requires_grad)


class ParameterSwapper:
    """Wraps a module's forwards and swaps its parameters, until `undo`."""

    def __init__(
        self,
        module: nn.Module,
        units: list[Unit],
        source: Source,
        planned: _engine.Plan,
        engine: _engine.Engine | None,
        device: torch.device,
        memory: DeviceMemory,
        turn_limit_s: float,
        checker: Checker | None = None,
        images: Sequence[Image] = (),
    ) -> None:
        """`engine` None: every unit is always there, with whatever bytes the memory has."""
        self._planned = planned
        self._checker = checker
        self._images = images  # of the source's tensors, where there is a checker
        self._engine = engine
        self._device = device
        self.seam = make_seam(engine, device, turn_limit_s, self.check_frozen)
        self._replacements = _engine.Replacements()
        self._warned: set[str] = set()
        self._homes: list[tuple[torch.Tensor, int]] = []
        largest = max((tensor.nbytes for tensor in source.tensors), default=0)
        self.outside_reads = OutsideReads(largest)
        # By unit and tensor in the unit: the image, where its bytes are to be checked.
        self._checks: dict[tuple[int, int], tuple[Image, str]] = {}
        self._placed: dict[str, PlacedParameter] = {}  # by entry name
        begin = memory.arena.data_ptr()
        self._arena = range(begin, begin + memory.arena.numel())
        # By entry name: what makes the parameter. By unit: what is made when it arrives.
        self._made: dict[str, Arrival] = {}
        self._arriving: dict[int, list[ArrivingParameter]] = {}
        self.arrivals: dict[int, UnitArrivals] = {}  # by unit, where there is anything to do
        try:
            holders: set[int] = set()
            for index, unit in enumerate(units):
                arena = memory.arena.data  # a version of its own for each unit's parameters
                check = self._check_of(index, unit, source, memory)
                swaps = self._place(index, unit, source, memory, arena)
                if planned.streamed_bytes(index):
                    self._stream(index, unit, arena, swaps, check)
                    holders.add(id(unit.module))
            if holders:
                wrap_ancestors(module, holders, self.seam, self, self._replacements)
        except BaseException:
            self.undo()
            raise
        # The parameters of a home block are views of it, and share its version.
        self._homes = [(block, block._version) for block in memory.homes]

    def _stream(
        self,
        index: int,
        unit: Unit,
        arena: torch.Tensor,
        swaps: list[_engine.ParameterSwap],
        check: UnitCheck | None,
    ) -> None:
        arriving = self._arriving.get(index, [])
        if check is not None or arriving:
            self.arrivals[index] = UnitArrivals(check, arriving)
        place = self._planned.place(index)
        self.seam.add_unit(index, unit.name, place, swaps, arena, self.arrivals.get(index))
        names = [entry.name for entry in unit.entries]
        wrap_unit(unit.module, index, names, self.seam, self, self._replacements)

    def placed_parameters(self) -> list[nn.Parameter]:
        """The parameters of the base that lie in device memory, for good or by turns."""
        return [found.placed for found in self._placed.values()]

    @without_modes()
    def fetch(self, name: str) -> torch.Tensor:
        """A copy of the parameter's bytes on the device.

        Raises KeyError where there is no such parameter.
        """
        if name not in self._placed:
            raise KeyError(f"there is no streamed parameter {name!r}")
        found = self._placed[name]
        if found.absent is None:
            return found.placed.detach().clone()
        return self.fetch_host(name).to(self._device)

    @without_modes()
    def fetch_host(self, name: str) -> torch.Tensor:
        """The same in RAM; takes no memory of the device."""
        found = self._placed[name]
        copy = empty_in_ram(found.placed.shape, found.placed.dtype)
        if found.absent is None:
            return copy.copy_(found.placed.detach())
        self._fetch(found.unit, found.tensor, self._made.get(name), copy)
        return copy

    def _fetch(self, unit: int, tensor: int, arrival: Arrival | None, target: torch.Tensor) -> None:
        """Fill `target`, which is in RAM."""
        if arrival is None:
            arrived = target.reshape(-1).view(torch.uint8)
        else:
            arrived = empty_in_ram([arrival.nbytes])
        assert self._engine is not None
        self._engine.fetch(unit, tensor, address_of(arrived, arrived.nbytes))
        if self._checker is not None:
            image, where = self._checks[unit, tensor]
            image.check(arrived, where)
        if arrival is not None:
            arrival.write(arrived, target)

    def undo(self) -> None:
        """Leave the module as it was found; what a user has set in the meantime stays."""
        self.seam.dissolve()
        self._replacements.undo()
        self._homes = []
        self._placed.clear()  # they view memory that may be freed now

    def _check_of(
        self, index: int, unit: Unit, source: Source, memory: DeviceMemory
    ) -> UnitCheck | None:
        """Checks what of the unit was loaded to stay; what checks the rest, each time it comes."""
        if self._checker is None or self._engine is None:
            return None
        where = f"unit {unit.name!r}"
        streamed: list[tuple[Image, torch.Tensor]] = []
        places = self._planned.tensor_locations(index)
        for tensor, member in enumerate(unit_tensors(unit, source)):
            place = places[tensor]
            image = self._images[member]
            self._checks[index, tensor] = image, where
            with torch.inference_mode(False):
                if place.block is None:
                    end = place.image_offset + image.nbytes
                    streamed.append((image, memory.arena[place.image_offset : end]))
                elif member not in source.arrivals and not memory.loaded[place.block]:
                    home = memory.homes[place.block]
                    image.check_once(home[place.offset : place.offset + image.nbytes], where)
        return UnitCheck(self._engine, index, where, streamed, self._checker.counts)

    # -- parameters --------------------------------------------------------------------------------

    def _place(
        self, index: int, unit: Unit, source: Source, memory: DeviceMemory, arena: torch.Tensor
    ) -> list[_engine.ParameterSwap]:
        """Builds the unit's parameters over device memory; what streams gets a placeholder."""
        tensor_of = {member: i for i, member in enumerate(unit_tensors(unit, source))}
        places = self._planned.tensor_locations(index)
        swaps: list[_engine.ParameterSwap] = []
        made: set[int] = set()
        for entry in unit.entries:
            tensor = tensor_of[source.index_of[entry.name]]
            place = places[tensor]
            resident = place.block is not None
            arrival = source.arrivals.get(source.index_of[entry.name])
            found = live(entry)
            nbytes = found.numel() * found.element_size()
            held = arena if place.block is None else memory.homes[place.block]
            with torch.inference_mode(False):
                view = held[place.offset : place.offset + nbytes].view(found.dtype)
                view = view.view(found.shape)
                placed = nn.Parameter(view, requires_grad=False)
            parameters: dict[str, Any] = entry.owner._parameters
            if arrival is not None:
                self._made[entry.name] = arrival
                if tensor not in made and resident:
                    whole = empty_in_ram(found.shape, found.dtype)
                    self._fetch(index, tensor, arrival, whole)
                    placed.copy_(whole)
                    if self._checker is not None:
                        self._checker.check_copy(whole, placed, f"parameter {entry.name!r}")
                elif tensor not in made:
                    end = place.image_offset + arrival.nbytes
                    arriving = ArrivingParameter(
                        arrival, memory.arena[place.image_offset : end], placed
                    )
                    self._arriving.setdefault(index, []).append(arriving)
                made.add(tensor)
            if resident:
                self._placed[entry.name] = PlacedParameter(
                    index, tensor, parameters, entry.key, found, placed, None
                )
                self._replacements.put(parameters, entry.key, placed)
                continue
            absent = StreamedParameter(found.shape, found.dtype, placed.device, entry.name, self)
            self._placed[entry.name] = PlacedParameter(
                index, tensor, parameters, entry.key, found, placed, absent
            )
            self._replacements.put(parameters, entry.key, absent)
            swaps.append(_engine.ParameterSwap(parameters, entry.key, placed, view, absent))
        return swaps

    @never_compiled
    def use(self, name: str, operation: Callable[[torch.Tensor], Any]) -> Any:
        """The operation on a parameter that is not in place: a use of its unit like any other.

        So the order of use learns it, and from the next pass on it is there in time. The unit stays
        until another one is used. Outside of all passes the operation gets a copy.
        """
        if self.seam.dissolved:
            raise RuntimeError(f"parameter {name!r}: its streamed module was closed or resized")
        if current_task() < 0 and not self.seam.inside:
            copy, absent = self.fetch(name), self._placed[name].absent
            assert absent is not None
            self.outside_reads.add(absent, copy)
            return operation(copy)
        found = self._placed[name]
        with self.seam.lend(found.unit) as lent:
            if lent:
                return operation(found.placed)
        self._warn_of_fetch(name)
        return operation(self.fetch(name))

    def allow(self, parameters: list[StreamedParameter]) -> None:
        """Raises RuntimeError where one operation would fetch too much."""
        if current_task() < 0 and not self.seam.inside:
            names = [parameter.wsm_name for parameter in parameters]
            self.outside_reads.allow(names, sum(parameter.nbytes for parameter in parameters))

    def replace(self, name: str, value: torch.Tensor) -> None:
        """Somebody has set other data: it is used from now on, wherever the parameter was."""
        mine = self._placed[name]
        for other in self._placed.values():
            if other.found is mine.found and other.is_ours:
                grad = other.absent is not None and other.absent.requires_grad
                other.entries[other.key] = nn.Parameter(value.detach(), requires_grad=grad)

    @property
    def user_bytes(self) -> int:
        """Of parameters that somebody has set in place of streamed ones."""
        theirs = (p.entries.get(p.key) for p in self._placed.values() if not p.is_ours)
        return sum({id(t): t.nbytes for t in theirs if t is not None}.values())

    @never_compiled
    def before_pass(self) -> None:
        """Raises RuntimeError where a change to a parameter would be lost, or cannot be seen."""
        self.outside_reads.check()
        if any(block._version != version for block, version in self._homes):
            raise RuntimeError(
                "a weight of the streamed base, one that stays on the device, was written to in"
                " place: whether that lasts depends on the budgets. close() the streamed module and"
                " stream it again. Set parameters of your own instead (module.weight ="
                " torch.nn.Parameter(...))"
            )
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                "torch.jit.trace() of a streamed module would record the addresses of weights that"
                " are only there for a moment: trace the module before stream(), or after close()"
            )

    @never_compiled
    def own(self, values: Any) -> Any:
        """The values, with copies of those that lie in the arena."""
        if isinstance(values, torch.Tensor):  # as most forwards return: no tree to walk
            if not self._in_arena(values):
                return values
        elif not any(map(self._in_arena, tensors_in(values))):
            return values
        # Autograd sees a view of a placeholder, which must not be an inference tensor.
        with torch.inference_mode(False):
            return map_tensors(lambda t: t.clone() if self._in_arena(t) else t, values)

    def _in_arena(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, StreamedParameter) or tensor.is_meta:
            return False
        return any(address in self._arena for address in addresses_of(tensor))

    def _warn_of_fetch(self, name: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"parameter {name!r} was used where its unit cannot be loaded, beside units that"
                " need its place: a copy is fetched for each use, which is slow. Name a module that"
                " holds both in units=[...]",
                stacklevel=6,
            )

    @never_compiled
    def check_frozen(self, names: Iterable[str] | None = None) -> None:
        """Raise where a parameter of the base is to be trained: its changes would be lost."""
        for name in self._placed if names is None else names:
            if self._placed[name].to_be_trained:
                _refuse_training(name)


def _refuse_training(name: str) -> NoReturn:
    raise RuntimeError(
        f"parameter {name!r} requires grad and is part of the streamed base, which is frozen: what"
        f" an optimizer changes in it would be lost. Call requires_grad_(False) on it, and train"
        " parameters of your own (adapters, say), added after stream()"
    )

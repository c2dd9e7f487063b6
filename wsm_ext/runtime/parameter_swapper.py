"""Puts parameters into the module just before its forward, and takes them out after it.

The engine decides when bytes are on the device; this is the seam to PyTorch: the forward of each
unit's module is wrapped on the instance, and so is that of every module that holds units, to know
where a pass begins and ends.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from .. import _engine
from ..checkpoints.arrival import Arrival
from ..modules.dynamo import between_graphs, break_graph, never_compiled
from ..modules.placeholder import StreamedParameter
from ..modules.raw_memory import address_of, empty_in_ram, without_modes
from ..modules.sources import Source, live
from ..modules.spec import unit_tensors
from ..modules.tensor_tree import map_tensors, tensors_in
from ..modules.units import Unit
from ..planning.device_memory import DeviceMemory
from .backward import Backward
from .integrity import Checker, Image, UnitCheck
from .passes import Passes, current_task
from .streamed_unit import Arriving, StreamedUnit, Swap


class ParameterSwapper:
    """Wraps a module's forwards and swaps its parameters, until `undo`."""

    def __init__(
        self,
        module: nn.Module,
        units: list[Unit],
        source: Source,
        planned: _engine.Plan,
        engine: _engine.Engine,
        device: torch.device,
        memory: DeviceMemory,
        turn_limit_s: float,
        checker: Checker | None = None,
        images: Sequence[Image] = (),
    ) -> None:
        self._planned = planned
        self._checker = checker
        self._images = images  # of the source's tensors, where there is a checker
        self._engine = engine
        self._device = device
        self._current_stream = stream_getter(device)
        self.passes = Passes(engine, self._current_stream, turn_limit_s)
        self._undone = False
        self._undo: list[Callable[[], None]] = []
        self._warned: set[str] = set()
        # By unit and tensor in the unit: the image, where its bytes are to be checked.
        self._checks: dict[tuple[int, int], tuple[Image, str]] = {}
        # By entry name: its unit, its tensor in the unit, and the parameter on the device.
        self._placed: dict[str, tuple[int, int, bool, nn.Parameter]] = {}
        self._streamed: dict[int, StreamedUnit] = {}
        self._active: list[int] = []  # units whose forwards run, outermost first
        self._lent: list[int] = []  # units that operations on placeholders use now
        self._lingering: tuple[int, int] | None = None  # the one used so last, and its stream
        self._backward = Backward(
            self._streamed,
            self.passes,
            self._current_stream,
            self._check_frozen,
            self._end_lingering,
        )
        self._arena_storage = memory.arena.untyped_storage().data_ptr()
        # By entry name: what makes the parameter. By unit: what is made when it arrives.
        self._made: dict[str, Arrival] = {}
        self._arriving: dict[int, list[Arriving]] = {}
        try:
            holders: set[int] = set()
            for index, unit in enumerate(units):
                arena = memory.arena.data  # a version of its own for each unit's parameters
                check = self._check_of(index, unit, source, memory)
                swaps = self._place(index, unit, source, memory, arena)
                if planned.streamed_bytes(index):
                    place = planned.place(index)
                    arriving = self._arriving.get(index, [])
                    streamed = StreamedUnit(
                        engine, index, unit.name, swaps, arena, place, arriving, check
                    )
                    self._streamed[index] = streamed
                    self._wrap(unit.module, self._streamed_forward(unit, streamed))
                    holders.add(id(unit.module))
            if holders:
                self._wrap_ancestors(module, holders)
                self._guard_conversions(module)
        except BaseException:
            self.undo()
            raise

    @without_modes()
    def fetch(self, name: str) -> torch.Tensor:
        """A copy of the parameter's bytes on the device.

        Raises KeyError where there is no such parameter.
        """
        if name not in self._placed:
            raise KeyError(f"there is no streamed parameter {name!r}")
        resident, parameter = self._placed[name][2:]
        return parameter.detach().clone() if resident else self.fetch_host(name).to(self._device)

    @without_modes()
    def fetch_host(self, name: str) -> torch.Tensor:
        """The same in RAM; takes no memory of the device."""
        unit, tensor, resident, parameter = self._placed[name]
        copy = empty_in_ram(parameter.shape, parameter.dtype)
        if resident:
            return copy.copy_(parameter.detach())
        self._fetch(unit, tensor, self._made.get(name), copy)
        return copy

    def _fetch(self, unit: int, tensor: int, arrival: Arrival | None, target: torch.Tensor) -> None:
        """Fill `target`, which is in RAM."""
        if arrival is None:
            arrived = target.reshape(-1).view(torch.uint8)
        else:
            arrived = empty_in_ram([arrival.nbytes])
        self._engine.fetch(unit, tensor, address_of(arrived, arrived.nbytes))
        if self._checker is not None:
            image, where = self._checks[unit, tensor]
            image.check(arrived, where)
        if arrival is not None:
            arrival.write(arrived, target)

    def undo(self) -> None:
        """Leave the module as it was found."""
        self._undone = True
        self._backward.dissolve()
        for streamed in self._streamed.values():
            streamed.dissolve()
        while self._undo:
            self._undo.pop()()
        self._placed.clear()  # they view memory that may be freed now

    def _check_of(
        self, index: int, unit: Unit, source: Source, memory: DeviceMemory
    ) -> UnitCheck | None:
        """Checks what of the unit was loaded to stay; what checks the rest, each time it comes."""
        if self._checker is None:
            return None
        where = f"unit {unit.name!r}"
        streamed: list[tuple[Image, torch.Tensor]] = []
        places = self._planned.tensor_places(index)
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
    ) -> list[Swap]:
        """Builds the unit's parameters over device memory; what streams gets a placeholder."""
        tensor_of = {member: i for i, member in enumerate(unit_tensors(unit, source))}
        places = self._planned.tensor_places(index)
        swaps: list[Swap] = []
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
                placed = nn.Parameter(view.view(found.shape), requires_grad=False)
            parameters: dict[str, Any] = entry.owner._parameters
            self._undo.append(functools.partial(parameters.__setitem__, entry.key, found))
            self._placed[entry.name] = (index, tensor, resident, placed)
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
                    arrived = memory.arena[place.image_offset : end]
                    self._arriving.setdefault(index, []).append((arrival, arrived, placed))
                made.add(tensor)
            if resident:
                parameters[entry.key] = placed
                continue
            absent = StreamedParameter(found.shape, found.dtype, placed.device, entry.name, self)
            parameters[entry.key] = absent
            swaps.append((parameters, entry.key, placed, absent))
        return swaps

    @contextmanager
    def lend(self, name: str) -> Iterator[torch.Tensor]:
        """A parameter that is used while it is not in place: a use of its unit like any other.

        So the order of use learns it, and from the next pass on it is there in time. The unit stays
        until another one is used.
        """
        if self._undone:
            raise RuntimeError(f"parameter {name!r}: its streamed module was closed or resized")
        index, _, _, parameter = self._placed[name]
        if current_task() >= 0:
            self._backward.join()
        elif not self.passes.inside():
            raise RuntimeError(
                f"parameter {name!r} is streamed: its bytes are on the device only during the"
                f" forward of its module. Use fetch({name!r}) of the streamed module, or close()"
                " the streamed module first"
            )
        unit = self._streamed[index]
        others = [self._streamed[other] for other in (*self._active, *self._lent)]
        if any(map(unit.overlaps, others)) or self._backward.in_the_way_of(index):
            self._warn_of_fetch(name)
            yield self.fetch(name)
            return
        if self._lingering is not None and unit.overlaps(self._streamed[self._lingering[0]]):
            self._end_lingering()
        stream = self._current_stream()
        unit.acquire(stream)
        self._lent.append(index)
        try:
            yield parameter
        finally:
            self._lent.remove(index)
            self._end_lingering()
            self._lingering = (index, stream)

    @never_compiled
    def own(self, values: Any) -> Any:
        """The values, with copies of those that lie in the arena."""

        def in_arena(tensor: torch.Tensor) -> bool:
            if isinstance(tensor, StreamedParameter) or tensor.is_meta:
                return False
            return tensor.untyped_storage().data_ptr() == self._arena_storage

        if isinstance(values, torch.Tensor):  # as most forwards return: no tree to walk
            if not in_arena(values):
                return values
        elif not any(map(in_arena, tensors_in(values))):
            return values
        # Autograd sees a view of a placeholder, which must not be an inference tensor.
        with torch.inference_mode(False):
            return map_tensors(lambda t: t.clone() if in_arena(t) else t, values)

    @never_compiled
    def _end_lingering(self) -> None:
        if self._lingering is not None:
            (index, stream), self._lingering = self._lingering, None
            self._streamed[index].release(stream)

    @never_compiled
    def _leave(self) -> None:
        try:
            self._end_lingering()
        finally:
            self.passes.leave()

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
    def _check_frozen(self, names: Iterable[str] | None = None) -> None:
        """Raise where a parameter of the base is to be trained: its changes would be lost."""
        for name in self._placed if names is None else names:
            if self._placed[name][3].requires_grad:
                _refuse_training(name)

    # -- forwards ----------------------------------------------------------------------------------

    def _wrap(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        own = module.__dict__.get("forward")
        functools.update_wrapper(forward, module.forward)
        module.forward = forward

        def unwrap() -> None:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.forward = own

        self._undo.append(unwrap)

    def _streamed_forward(self, unit: Unit, streamed: StreamedUnit) -> Callable[..., Any]:
        forward = unit.module.forward
        index, names = streamed.index, [entry.name for entry in unit.entries]
        passes, backward, current_stream = self.passes, self._backward, self._current_stream
        active = self._active

        def loaded(*args: Any, **kwargs: Any) -> Any:
            break_graph()
            known: dict[Any, None] = {}
            passes.enter()
            try:
                if torch.is_grad_enabled():
                    self._check_frozen(names)
                    for _, _, _, absent in streamed.swaps:
                        if absent.requires_grad:
                            _refuse_training(absent.wsm_name)
                    known = backward.nodes_of((args, kwargs))
                self._end_lingering()
                if current_task() >= 0:  # a forward that runs inside a backward
                    backward.join()
                    backward.before_forward(index)
                stream = current_stream()
                streamed.acquire(stream)
                active.append(index)
                try:
                    result = self.own(forward(*args, **kwargs))
                    if torch.is_grad_enabled():
                        made = backward.nodes_of((result, args, kwargs))
                        backward.expect(made.keys() - known.keys(), tuple(dict.fromkeys(active)))
                finally:
                    active.pop()
                    if backward.under_way:
                        backward.keep(index)
                    streamed.release(stream)
                    backward.resume(active)
            finally:
                self._leave()
            return result

        return between_graphs(loaded)

    def _wrap_ancestors(self, module: nn.Module, holders: set[int]) -> None:
        passes = self.passes

        def within_pass(forward: Callable[..., Any]) -> Callable[..., Any]:
            def entered(*args: Any, **kwargs: Any) -> Any:
                break_graph()
                passes.enter()
                try:
                    return forward(*args, **kwargs)
                except torch.OutOfMemoryError as error:
                    passes.explain(error)
                    raise
                finally:
                    self._leave()

            return between_graphs(entered)

        for outer in module.modules():
            if id(outer) in holders or isinstance(outer, (nn.ModuleList, nn.ModuleDict)):
                continue
            if any(id(inner) in holders for inner in outer.modules()):
                self._wrap(outer, within_pass(outer.forward))

    def _guard_conversions(self, module: nn.Module) -> None:
        """`to`, `half`, `cuda` and the like go through `_apply`: all or nothing. No copies."""

        def guarded(inner: nn.Module) -> Callable[..., nn.Module]:
            @torch.inference_mode(False)  # inside it, even to() where it changes nothing asks
            def apply(fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
                for name, parameter in inner.named_parameters(recurse=recurse):
                    if id(parameter) in ours and not _same(fn, parameter):
                        raise RuntimeError(
                            f"{name!r} is part of a streamed module: its dtype and device were"
                            " settled by stream() and cannot be changed by to(), half(), cuda() and"
                            " the like. close() the streamed module, and stream it as you want it"
                        )
                converted: nn.Module = type(inner)._apply(inner, fn, recurse)
                return converted

            return apply

        def refuse_copy(protocol: object) -> NoReturn:
            raise TypeError(
                "a module that is streamed cannot be copied or pickled: do it before stream(), or"
                " after close()"
            )

        placed = {id(parameter) for _, _, _, parameter in self._placed.values()}
        ours = {
            id(parameter)
            for parameter in module.parameters()
            if isinstance(parameter, StreamedParameter) or id(parameter) in placed
        }
        for inner in module.modules():
            if any(id(parameter) in ours for parameter in inner.parameters()):
                for name, method in (("_apply", guarded(inner)), ("__reduce_ex__", refuse_copy)):
                    inner.__dict__[name] = method
                    self._undo.append(functools.partial(inner.__dict__.pop, name, None))


def stream_getter(device: torch.device) -> Callable[[], int]:
    """The compute stream of the calling thread as an integer; 0 on the host device."""
    if device.type != "cuda":
        return lambda: 0
    index = torch.cuda.current_device() if device.index is None else device.index
    raw: Callable[[int], int] = torch._C._cuda_getCurrentRawStream  # makes no Stream object
    return lambda: raw(index)


def _same(fn: Callable[..., Any], parameter: torch.Tensor) -> bool:
    """Whether a conversion leaves the parameter as it is."""
    try:
        return fn(parameter) is parameter
    except RuntimeError:
        return False


def _refuse_training(name: str) -> NoReturn:
    raise RuntimeError(
        f"parameter {name!r} requires grad and is part of the streamed base, which is frozen: what"
        f" an optimizer changes in it would be lost. Call requires_grad_(False) on it, and train"
        " parameters of your own (adapters, say), added after stream()"
    )

"""Puts parameters into the module just before its forward, and takes them out after it.

The engine decides when bytes are on the device; this is the seam to PyTorch: the forward of each
unit's module is wrapped on the instance, and so is that of every module that holds units, to know
where a pass begins and ends.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from . import _engine
from .arrival import Arrival
from .device_memory import DeviceMemory
from .placeholder import StreamedParameter
from .sources import Source, live
from .units import Unit

# A module's parameters, the key in them, what is there during the forward, and what at other times.
Swap = tuple[dict[str, Any], str, nn.Parameter, StreamedParameter]


class Passes:
    """One pass at a time: entered by every wrapped forward, begun by the outermost."""

    def __init__(
        self, engine: _engine.Engine, current_stream: Callable[[], int], limit_s: float
    ) -> None:
        self._engine = engine
        self._stream = current_stream
        self._limit_s = limit_s
        self._turn = threading.RLock()
        self._process = os.getpid()
        self.depth = 0
        self._owner: int | None = None

    @contextmanager
    def between(self) -> Iterator[None]:
        """Held while no other thread is in a pass."""
        self._wait()
        try:
            yield
        finally:
            self._turn.release()

    def _wait(self) -> None:
        if os.getpid() != self._process:  # a forked child has not the thread whose turn it was
            self._turn, self._process = threading.RLock(), os.getpid()
        if not self._turn.acquire(timeout=self._limit_s):
            raise TimeoutError(
                f"another thread has been in a forward of this streamed model for {self._limit_s:g}"
                " s. If that forward waits for this thread, it cannot go on: call the units of one"
                " model from one thread"
            )

    def enter(self) -> None:
        self._wait()
        try:
            if self.depth == 0:
                self._engine.begin_pass(self._stream())
                self._owner = threading.get_ident()
            self.depth += 1
        except BaseException:
            self._turn.release()
            raise

    def leave(self) -> None:
        try:
            self.depth -= 1
            if self.depth == 0:
                self._owner = None
                self._engine.end_pass(self._stream())
        finally:
            self._turn.release()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """The outermost forward says what can be done when device memory runs out."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.depth > 1:
                raise
            raise torch.OutOfMemoryError(
                f"{error}\nThe streamed weights keep what they were given: shrink('1GiB') of the"
                " streamed module gives device memory back, and workload=(batch, tokens) makes"
                " stream() leave room for a forward of that size"
            ) from error

    def inside(self) -> bool:
        """Whether this thread is in the middle of a pass."""
        return self._owner == threading.get_ident()


class Residency:
    """Wraps a module's forwards and swaps its parameters, until `undo`."""

    def __init__(
        self,
        module: nn.Module,
        units: list[Unit],
        source: Source,
        planned: _engine.PlannedModel,
        engine: _engine.Engine,
        device: torch.device,
        memory: DeviceMemory,
        turn_limit_s: float,
    ) -> None:
        self._planned = planned
        self._engine = engine
        self._device = device
        self._current_stream = stream_getter(device)
        self.passes = Passes(engine, self._current_stream, turn_limit_s)
        self._undone = False
        self._undo: list[Callable[[], None]] = []
        self._warned: set[str] = set()
        # By slot name: its unit, its tensor in the unit, and the parameter on the device.
        self._placed: dict[str, tuple[int, int, bool, nn.Parameter]] = {}
        # By slot name: what makes the parameter. By unit: what is made when it arrives.
        self._made: dict[str, Arrival] = {}
        self._arriving: dict[int, list[tuple[Arrival, torch.Tensor, nn.Parameter]]] = {}
        try:
            holders: set[int] = set()
            for index, unit in enumerate(units):
                swaps = self._place(index, unit, source, memory)
                if planned.streamed_bytes(index):
                    self._wrap(unit.module, self._streamed_forward(index, unit, swaps))
                    holders.add(id(unit.module))
            if holders:
                self._wrap_ancestors(module, holders)
        except BaseException:
            self.undo()
            raise

    def fetch(self, name: str) -> torch.Tensor:
        """A copy of the parameter's bytes on the device.

        Raises KeyError where there is no such parameter.
        """
        if name not in self._placed:
            raise KeyError(f"there is no streamed parameter {name!r}")
        resident, parameter = self._placed[name][2:]
        return parameter.detach().clone() if resident else self.fetch_host(name).to(self._device)

    def fetch_host(self, name: str) -> torch.Tensor:
        """The same in RAM; takes no memory of the device."""
        unit, tensor, resident, parameter = self._placed[name]
        copy = torch.empty(parameter.shape, dtype=parameter.dtype)
        if resident:
            return copy.copy_(parameter.detach())
        self._fetch(unit, tensor, self._made.get(name), copy)
        return copy

    def _fetch(self, unit: int, tensor: int, arrival: Arrival | None, target: torch.Tensor) -> None:
        """Fill `target`, which is in RAM."""
        if arrival is None:
            self._engine.fetch(unit, tensor, target.data_ptr())
            return
        arrived = torch.empty(arrival.nbytes, dtype=torch.uint8)
        self._engine.fetch(unit, tensor, arrived.data_ptr())
        arrival.write(arrived, target)

    def undo(self) -> None:
        """Leave the module as it was found."""
        self._undone = True
        while self._undo:
            self._undo.pop()()

    # -- parameters --------------------------------------------------------------------------------

    def _place(self, index: int, unit: Unit, source: Source, memory: DeviceMemory) -> list[Swap]:
        """Builds the unit's parameters over device memory; what streams gets a placeholder."""
        members = unit_tensors(unit, source)
        places = self._planned.tensor_places(index)
        swaps: list[Swap] = []
        made: set[int] = set()
        for slot in unit.slots:
            tensor = members.index(source.index_of[slot.name])
            block, offset, image_offset = places[tensor]
            resident = block is not None
            arrival = source.arrivals.get(source.index_of[slot.name])
            found = live(slot)
            nbytes = found.numel() * found.element_size()
            held = memory.arena if block is None else memory.homes[block]
            with torch.inference_mode(False):
                view = held[offset : offset + nbytes].view(found.dtype).view(found.shape)
                placed = nn.Parameter(view, requires_grad=False)
            parameters: dict[str, Any] = slot.owner._parameters
            self._undo.append(functools.partial(parameters.__setitem__, slot.key, found))
            self._placed[slot.name] = (index, tensor, resident, placed)
            if arrival is not None:
                self._made[slot.name] = arrival
                if tensor not in made and resident:
                    whole = torch.empty(found.shape, dtype=found.dtype)
                    self._fetch(index, tensor, arrival, whole)
                    placed.copy_(whole)
                elif tensor not in made:
                    arrived = memory.arena[image_offset : image_offset + arrival.nbytes]
                    self._arriving.setdefault(index, []).append((arrival, arrived, placed))
                made.add(tensor)
            if resident:
                parameters[slot.key] = placed
                continue
            absent = StreamedParameter(
                found.shape, found.dtype, placed.device, slot.name, self._resolve
            )
            parameters[slot.key] = absent
            swaps.append((parameters, slot.key, placed, absent))
        return swaps

    def _arrive(self, index: int) -> None:
        """Make what an arrival transform makes of the acquired unit's bytes, in stream order."""
        for arrival, arrived, placed in self._arriving.get(index, ()):
            arrival.write(arrived, placed)

    def _resolve(self, name: str) -> torch.Tensor:
        """The bytes of a parameter that is touched while it is not in place."""
        if not self.passes.inside():
            raise RuntimeError(
                f"parameter {name!r} is streamed: its bytes are on the device only during the"
                f" forward of its module. Use fetch({name!r}) of the streamed module, or close()"
                " the streamed module first"
            )
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"parameter {name!r} was read outside the forward of its own module and is loaded"
                " on demand, which is slow; name the module that reads it in units=[...]",
                stacklevel=3,
            )
        return self.fetch(name)

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

    def _streamed_forward(
        self,
        index: int,
        unit: Unit,
        swaps: list[Swap],
    ) -> Callable[..., Any]:
        forward = unit.module.forward
        acquire, release = self._engine.acquire, self._engine.release
        passes, current_stream = self.passes, self._current_stream
        depth = 0  # of calls of this module within itself

        def streamed(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if torch.is_grad_enabled():
                refuse_gradients(unit.name, "an input", (args, kwargs))
            passes.enter()
            try:
                stream = current_stream()
                acquire(index, stream)
                depth += 1
                try:
                    self._arrive(index)
                    for parameters, key, placed, _ in swaps:
                        parameters[key] = placed
                    result = forward(*args, **kwargs)
                finally:
                    depth -= 1
                    if depth == 0 and not self._undone:
                        for parameters, key, _, absent in swaps:
                            parameters[key] = absent
                    release(index, stream)
            finally:
                passes.leave()
            if torch.is_grad_enabled():
                refuse_gradients(unit.name, "a trainable parameter and gave an output", result)
            return result

        return streamed

    def _wrap_ancestors(self, module: nn.Module, holders: set[int]) -> None:
        passes = self.passes

        def within_pass(forward: Callable[..., Any]) -> Callable[..., Any]:
            def entered(*args: Any, **kwargs: Any) -> Any:
                passes.enter()
                try:
                    with passes.explained():
                        return forward(*args, **kwargs)
                finally:
                    passes.leave()

            return entered

        for outer in module.modules():
            if id(outer) in holders or isinstance(outer, (nn.ModuleList, nn.ModuleDict)):
                continue
            if any(id(inner) in holders for inner in outer.modules()):
                self._wrap(outer, within_pass(outer.forward))


def unit_tensors(unit: Unit, source: Source) -> list[int]:
    """The unit's tensors, each once, in the order of its slots."""
    return list(dict.fromkeys(source.index_of[slot.name] for slot in unit.slots))


def stream_getter(device: torch.device) -> Callable[[], int]:
    """The compute stream of the calling thread as an integer; 0 on the host device."""
    if device.type != "cuda":
        return lambda: 0
    current = torch.cuda.current_stream
    return lambda: current(device).cuda_stream


def refuse_gradients(name: str, what: str, values: Any) -> None:
    """A backward pass would read the arena after other units have written to it."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            raise RuntimeError(
                f"unit {name!r} is streamed and has {what} that requires grad: backward through"
                " streamed weights is not supported. Run under torch.no_grad() or inference_mode()"
            )

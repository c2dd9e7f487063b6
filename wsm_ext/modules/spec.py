"""What crosses to the planner: a module's units and their tensors, by the engine's own types."""

from __future__ import annotations

from collections.abc import Sequence

from .. import _engine
from .sources import Source
from .units import Unit


def model_spec(units: Sequence[Unit], source: Source) -> _engine.ModelSpec:
    """What a plan of these units is made for."""
    specs = [
        _engine.UnitSpec(unit.name, unit.label, unit_tensors(unit, source), unit.encloses_units)
        for unit in units
    ]
    return _engine.ModelSpec(source.shards, source.tensors, specs)


def unit_tensors(unit: Unit, source: Source) -> list[int]:
    """The unit's tensors, each once, in the order of its entries."""
    return list(dict.fromkeys(source.index_of[entry.name] for entry in unit.entries))


def unit_bytes(unit: Unit, source: Source) -> int:
    """What a load of all of the unit brings: a tied tensor once."""
    return sum(source.tensors[tensor].nbytes for tensor in unit_tensors(unit, source))


def unit_place_bytes(unit: Unit, source: Source) -> int:
    """What all of the unit takes in the arena: what a load brings, and what is made of it."""
    tensors = [source.tensors[tensor] for tensor in unit_tensors(unit, source)]
    return sum(tensor.nbytes + tensor.parameter_bytes for tensor in tensors)

"""What crosses to the planner: units and their bytes."""

from torch import nn

import wsm_ext as wsm
from wsm_ext.modules.sources import from_module
from wsm_ext.modules.spec import model_spec, unit_bytes, unit_place_bytes
from wsm_ext.modules.units import find_units

MIB = 1 << 20


class Tied(nn.Module):
    """Two linears that share a weight of a MiB."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(512, 512, bias=False)
        self.b = nn.Linear(512, 512, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def test_a_tied_tensor_counts_once_in_a_unit():
    net = nn.Sequential(*(nn.Sequential(Tied()) for _ in range(4)))
    units = find_units(net, [f"{i}.0" for i in range(4)])
    source = from_module(units)
    assert [unit_bytes(unit, source) for unit in units] == [MIB] * 4
    assert [unit_place_bytes(unit, source) for unit in units] == [MIB] * 4
    with wsm.stream(net, device="cpu", units=[unit.name for unit in units]) as streamed:
        assert [unit.bytes for unit in streamed.plan.units] == [MIB] * 4
        assert streamed.plan.model_bytes == 4 * MIB


def test_the_engine_gets_units_and_tensors_by_name():
    net = nn.Sequential(Tied(), nn.Linear(2, 3))
    units = find_units(net, "leaf")
    spec = model_spec(units, from_module(units))
    assert [unit.name for unit in spec.units] == [unit.name for unit in units]
    assert [(tensor.name, tensor.nbytes) for tensor in spec.tensors] == [
        ("0.a.weight", MIB),
        ("1.weight", 24),
        ("1.bias", 12),
    ]
    assert [unit.tensors for unit in spec.units] == [[0], [0], [1, 2]]
    assert all(shard.in_memory and shard.alignment == 1 for shard in spec.shards)
    [extent] = spec.tensors[1].extents
    assert (extent.shard, extent.offset, extent.nbytes, extent.tensor_offset) == (1, 0, 24, 0)

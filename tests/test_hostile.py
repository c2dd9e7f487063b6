"""Spoiled checkpoints, a few thousand of them; `make hostile` runs as many as one likes."""

import math
from pathlib import Path

import hostile_large
import pytest
from hostile import Hostile

from wsm_ext import _engine
from wsm_ext._engine import Extent, ModelSpec, ShardSpec, TensorSpec, UnitSpec
from wsm_ext.checkpoints.checkpoint import Checkpoint
from wsm_ext.checkpoints.image import CheckpointError
from wsm_ext.checkpoints.index import INDEX_SUFFIX


def test_spoiled_files_are_accepted_only_where_safetensors_accepts(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    hostile = Hostile(folder, seed=7, most_streamed=15)
    hostile.run(2000)
    counts = hostile.counts
    assert min(counts["file accepted"], counts["index accepted"]) > 100
    assert min(counts["file refused"], counts["index refused"]) > 200
    assert counts["streamed"] == 15


@pytest.mark.parametrize(
    "name", ["header over the limit", "header of zeros", "header of brackets", "one number"]
)
def test_headers_of_100_mb_of_nonsense_are_refused(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(hostile_large.FILES[name]())
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read") as error:
        Checkpoint.open(path)
    assert len(str(error.value)) < 2000


def test_messages_quote_no_control_characters_and_no_long_names(tmp_path):
    path = tmp_path / "x.safetensors"
    entry = b'{"a":{"dtype":"\\u001b[2J","shape":[],"data_offsets":[0,0]}}'
    path.write_bytes(hostile_large.header(entry))
    with pytest.raises(CheckpointError, match=r"\\x1b") as error:
        Checkpoint.open(path)
    assert "\x1b" not in str(error.value)
    index = tmp_path / f"x{INDEX_SUFFIX}"
    index.write_bytes(hostile_large.index(f'"a":"{"b" * 100_000}"'))
    with pytest.raises(CheckpointError, match="is not a file name") as error:
        Checkpoint.open(index)
    assert len(str(error.value)) < 2000


# What is checked again in C++

FOUR = ShardSpec("s", 4)
NINE = ShardSpec("s", 9)
EXTENT = Extent(0, 0, 4)
TENSOR = TensorSpec("t", 4, [EXTENT])
UNIT = UnitSpec("u", "u", [0])


@pytest.mark.parametrize(
    ("shards", "tensors", "units", "why"),
    [
        ([ShardSpec("s", 4, 3)], [], [], "alignment 3"),
        ([ShardSpec("s", 2**63)], [], [], "more than a file can have"),
        ([ShardSpec("s", 3)], [TENSOR], [], "ends outside shard s"),
        ([FOUR], [TensorSpec("t", 3, [EXTENT])], [], "ends outside the tensor"),
        ([FOUR], [TensorSpec("t", 4, [Extent(1, 0, 4)])], [], "in shard 1"),
        ([FOUR], [TensorSpec("t", 4, [Extent(0, 2**64 - 2, 4)])], [], "ends outside shard s"),
        ([NINE], [TensorSpec("t", 4, [EXTENT, EXTENT])], [], "two extents bring byte 0"),
        ([NINE], [TensorSpec("t", 5, [EXTENT])], [], "no extent brings byte 4"),
        ([FOUR], [TENSOR], [UnitSpec("u", "u", [1])], "tensor 1"),
        ([FOUR], [TENSOR], [UnitSpec("u", "u", [0, 0])], "in it twice"),
        ([], [TensorSpec("t", 0, [], 9)], [UNIT], "cannot be made of none"),
    ],
)
def test_the_engine_refuses_ranges_that_do_not_fit(shards, tensors, units, why):
    with pytest.raises(ValueError, match=why):
        _engine.plan_model(ModelSpec(shards, tensors, units), _engine.PlanLimits())


def planned() -> _engine.Plan:
    limits = _engine.PlanLimits()
    limits.device_bytes = limits.host_bytes = 1 << 24
    return _engine.plan_model(ModelSpec([FOUR], [TENSOR], [UNIT]), limits)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf, 1e-300])
def test_rates_that_are_none_are_refused(rate):
    rates = _engine.Rates()
    rates.disk_bytes_per_s = rate
    with pytest.raises(ValueError, match="rates must be"):
        _engine.simulate(planned(), rates)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_times_that_are_none_are_refused(seconds):
    rates = _engine.Rates()
    rates.compute_s = [seconds]
    with pytest.raises(ValueError, match="compute time"):
        _engine.simulate(planned(), rates)


def test_units_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="no unit 1"):
        _engine.simulate(planned(), _engine.Rates(), [1])
    with pytest.raises(IndexError):
        planned().place(1)
    with pytest.raises(TypeError):
        planned().place(-1)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("read_timeout_s", math.nan), ("read_timeout_s", 0.0), ("read_threads", 2**31)],
)
def test_options_that_no_reader_can_work_with_are_refused(tmp_path, setting, value):
    path: Path = tmp_path / "file"
    path.write_bytes(bytes(10))
    options = _engine.EngineOptions()
    setattr(options, setting, value)
    with pytest.raises(ValueError, match=setting):
        _engine.time_reads([str(path)], [_engine.FileExtent(0, 0, 10)], [options], 1.0)

"""What is measured, and what is remembered of it. Nothing here depends on how fast anything is."""

import json
import logging
import os
import time

import pytest
import torch
from torch import nn

from wsm_ext import _engine
from wsm_ext.config import Config
from wsm_ext.hf import building, two_layers
from wsm_ext.hf.synthetic import make_llama_checkpoint
from wsm_ext.planning import measure, measurements, rates
from wsm_ext.planning.measure import Compute, Link, NotMeasuredError, Span
from wsm_ext.planning.measurements import Measurements, file_system
from wsm_ext.planning.read_method import ReadMethod, engine_options

MIB = 1 << 20
CPU = torch.device("cpu")
TINY = {"layers": 5, "hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "vocab": 128}


def sparse(path, size):
    with open(path, "wb") as file:
        file.truncate(size)
    return path


# -- the link --------------------------------------------------------------------------------------


def test_a_link_is_what_both_sizes_of_copies_tell():
    rate, overhead = 50e9, 3e-6
    link = measure._link_of(*(size * MIB / rate + overhead for size in (16, 1)))
    assert link.bytes_per_s == pytest.approx(rate)
    assert link.copy_overhead_s == pytest.approx(overhead)


@pytest.mark.parametrize("small", [0.5, 0.02])  # longer than the large one; less than its share
def test_noise_in_small_copies_gives_no_overhead(small):
    large = 0.4
    assert measure._link_of(large, small) == Link(16 * MIB / large, 0.0)


def test_the_engine_copies_both_sizes(monkeypatch):
    asked, time_copies = [], _engine.time_copies

    def seen(*arguments):
        asked.append(arguments)
        return time_copies(*arguments)

    monkeypatch.setattr(_engine, "time_copies", seen)
    link = measure.measure_link(CPU)
    ((index, _, target, source, sizes),) = asked
    assert (index, sizes) == (-1, [16 * MIB, MIB])
    assert source > target >= 16 * MIB
    assert link.bytes_per_s > 0
    assert link.copy_overhead_s >= 0


@pytest.mark.parametrize("error", [MemoryError("no room"), _engine.EngineError("gone")])
def test_copies_that_cannot_be_made_are_no_measurement(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(_engine, "time_copies", fail)
    with pytest.raises(NotMeasuredError, match=str(error)):
        measure.measure_link(CPU)


# -- the disk --------------------------------------------------------------------------------------


def test_spans_cover_all_files_once_and_every_beginning_is_spread(tmp_path):
    files = [sparse(tmp_path / f"{i}", size * MIB) for i, size in enumerate((320, 640))]
    spans = measure.find_spans(files)
    assert len({(span.path, span.offset) for span in spans}) == len(spans) == 60
    assert all(span.offset + 16 * MIB <= span.path.stat().st_size for span in spans)
    for part in (spans[:12], spans[:30]):
        in_first = sum(span.path == files[0] for span in part)
        assert in_first == pytest.approx(len(part) / 3, abs=1.5)


def test_spans_are_at_most_2_gib_and_none_of_little(tmp_path):
    assert len(measure.find_spans([sparse(tmp_path / "large", 3 << 30)])) == 128
    little = [sparse(tmp_path / f"{i}", 31 * MIB) for i in range(3)]
    assert measure.find_spans(little) == []
    with pytest.raises(NotMeasuredError, match="less than 64"):
        measure.measure_disk([], Config())


def test_spans_know_what_is_in_the_page_cache_unless_that_is_not_used(tmp_path):
    path = tmp_path / "warm"
    path.write_bytes(bytes(64 * MIB))
    assert [span.cached for span in measure.find_spans([path])] == [True] * 4
    assert [span.cached for span in measure.find_spans([path], "on")] == [False] * 4


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_the_engines_reader_reads_the_spans(tmp_path, direct, monkeypatch):
    path = sparse(tmp_path / "file", 64 * MIB)
    monkeypatch.setattr(measure, "_SAMPLE_SECONDS", 0.01)
    found = measure.measure_disk(measure.find_spans([path]), Config(direct=direct))
    assert found.bytes_per_s > 0


class Drive:
    """Reads by each way as fast as `fast` says, else at 1 GB/s."""

    def __init__(self, monkeypatch, fast):
        self.fast, self.asked = fast, []
        monkeypatch.setattr(_engine, "time_reads", self.read)

    def read(self, paths, pieces, methods, seconds, rounds, most_seconds, chunk_bytes):
        self.asked.append((paths, pieces, methods))
        self.chunk_bytes = chunk_bytes
        return [self.samples(method, rounds) for method in methods]

    def samples(self, method, rounds):
        reader = (
            method.reader if method.reader != _engine.ReaderChoice.auto else method.preferred
        ).name
        rate = self.fast.get((reader, method.block_bytes), 1e9)
        if rate is None:
            return []
        if isinstance(rate, list):
            return rate
        return [rate * factor for factor in (1.0, 9.0, 0.1, 1.0, 1.0)][:rounds]


def test_all_spans_are_asked_for_with_the_settings_that_the_engine_gets(tmp_path, monkeypatch):
    files = [sparse(tmp_path / f"{i}", 48 * MIB) for i in range(2)]
    spans, drive = measure.find_spans(files), Drive(monkeypatch, {})
    measure.measure_disk(spans, Config(direct="on", reader="pread", read_threads=3))
    ((paths, pieces, methods),) = drive.asked
    assert [(paths[piece.file], piece.offset) for piece in pieces] == [
        (str(span.path), span.offset) for span in spans
    ]
    assert {piece.nbytes for piece in pieces} == {16 * MIB}
    assert drive.chunk_bytes == MIB
    for method in methods:
        assert (method.direct, method.reader) == (_engine.DirectMode.on, _engine.ReaderChoice.pread)
        assert (method.read_threads, method.read_timeout_s) == (3, 10)


@pytest.mark.parametrize(
    ("in_memory", "chunk_mb", "expected"),
    [
        (False, None, MIB),
        (True, None, 4 * MIB),
        (True, 2, 2 * MIB),
        (False, 0.1, 64 << 10),
        (False, 0.004, 64 << 10),
        (False, 256, 16 * MIB),
    ],
)
def test_the_disk_is_read_in_the_chunks_of_the_engine(monkeypatch, in_memory, chunk_mb, expected):
    monkeypatch.setattr(_engine, "lies_in_memory", lambda _: in_memory)
    config = Config.resolve({} if chunk_mb is None else {"chunk_mb": chunk_mb})
    assert measure.chunk_bytes([measure.Path("file")], config) == expected


COLD, WARM = Span(measurements.Path("file"), 0, False), Span(measurements.Path("file"), 0, True)


@pytest.mark.parametrize(
    ("fast", "settings", "best"),
    [
        ({("pread", MIB): 2e9}, {}, (2e9, ReadMethod("pread", MIB))),
        ({("uring", MIB): 2e9, ("pread", MIB): 1.9e9}, {}, (2e9, ReadMethod("uring", MIB))),
        ({("uring", MIB): 1.04e9}, {}, (1e9, ReadMethod())),  # not worth it
        # Twice as fast but for one round, in which the usual way had 9 GB/s.
        ({("uring", MIB): [2e9, 8e9, 2e9, 2e9, 2e9]}, {}, (1e9, ReadMethod())),
        ({("uring", MIB): [2e9, 9.1e9, 2e9, 2e9, 2e9]}, {}, (2e9, ReadMethod("uring", MIB))),
        ({("uring", MIB): [2e9, 9.1e9]}, {}, (1e9, ReadMethod())),  # the time was over before
        ({("uring", MIB): 2e9}, {"reader": "pread"}, (1e9, ReadMethod())),
        ({("uring", MIB): None}, {}, (1e9, ReadMethod())),  # cannot be had
        ({("pread", MIB): 2e9}, {"direct": "off"}, (1e9, ReadMethod())),  # through the page cache
    ],
)
def test_the_fastest_way_is_taken(monkeypatch, fast, settings, best):
    Drive(monkeypatch, fast)
    found = measure.measure_disk([COLD], Config(**settings))
    assert (found.bytes_per_s, found.read_method) == best


def test_what_is_cached_is_read_by_one_way(monkeypatch):
    drive = Drive(monkeypatch, {("pread", MIB): 2e9})
    assert measure.measure_disk([WARM], Config()) == measure.Disk(1e9)
    assert len(drive.asked[0][2]) == 1


def test_a_reader_that_was_asked_for_and_is_not_there_is_no_measurement(monkeypatch):
    Drive(monkeypatch, {("uring", 0): None, ("uring", MIB): None})
    with pytest.raises(NotMeasuredError, match="no reader 'uring'"):
        measure.measure_disk([COLD], Config(reader="uring"))


def test_the_engine_reads_as_it_was_measured(tmp_path, monkeypatch):
    """The way reaches the engine, is remembered, and a reader that is asked for goes before it."""
    Drive(monkeypatch, {("pread", MIB // 4): 3e9})
    path = sparse(tmp_path / "file", 64 * MIB)
    monkeypatch.setattr(measure, "_cached", lambda *_: False)
    for source in ("measured", "cached"):
        found = rates.gather(nn.Linear(2, 2), [path], CPU, Config.resolve({}, environ={}), None)
        assert (found.disk.source, found.read_method) == (source, ReadMethod("pread", MIB // 4))
        assert found.disk.note == "pread, blocks of 256.0 KiB"
    options = engine_options(Config(), found.read_method)
    assert (options.preferred, options.block_bytes) == (_engine.ReaderChoice.pread, MIB // 4)
    assert options.reader == _engine.ReaderChoice.auto


@pytest.mark.parametrize("error", [OSError(5, "gone"), TimeoutError("silent"), MemoryError("full")])
def test_reads_that_fail_are_no_measurement(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(_engine, "time_reads", fail)
    spans = [Span(tmp_path / "file", 0, False)]
    with pytest.raises(NotMeasuredError, match=r"reading failed: .*(gone|silent|full)"):
        measure.measure_disk(spans, Config())


def test_a_file_that_is_gone_is_no_measurement(tmp_path):
    with pytest.raises(NotMeasuredError, match=r"reading failed.*gone"):
        measure.measure_disk([Span(tmp_path / "gone", 0, False)], Config())


# -- one layer -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_llama_checkpoint(tmp_path_factory.mktemp("tiny") / "model", **TINY)
    return folder, building.prepare(folder)[0]


def test_a_layer_is_measured_from_two_of_them(tiny, monkeypatch):
    _, module = tiny
    made = []
    fill = two_layers._fill

    def seen(model, device):
        made.append(model)
        return fill(model, device)

    monkeypatch.setattr(two_layers, "_fill", seen)
    compute = measure.measure_layer(module, CPU, 2, 8)
    assert compute.layer_s > 0
    assert compute.tokens == 8
    assert set(compute.others) == {"model.embed_tokens", "model.norm", "lm_head"}
    assert len(made[0].model.layers) == 2
    assert made[0].model.embed_tokens.weight.shape == (TINY["vocab"], TINY["hidden"])
    assert module.config.num_hidden_layers == TINY["layers"]
    assert all(parameter.is_meta for parameter in module.parameters())


def test_lists_with_an_entry_for_each_layer_are_cut_too(tiny):
    from transformers import Qwen2Config

    config = Qwen2Config(num_hidden_layers=7, layer_types=["full_attention"] * 7)
    cut = two_layers._cut(config, None)
    assert (cut.num_hidden_layers, len(cut.layer_types)) == (2, 2)
    assert len(config.layer_types) == 7


def test_what_cannot_be_measured_says_why(tiny, monkeypatch):
    _, module = tiny
    with pytest.raises(NotMeasuredError, match="not a transformers model"):
        measure.measure_layer(nn.Linear(2, 2), CPU, 1, 1)
    monkeypatch.setattr(measure, "device_available", lambda *_: 1000)
    with pytest.raises(NotMeasuredError, match="two of its layers need"):
        measure.measure_layer(module, CPU, 1, 1)


def test_a_large_vocabulary_is_left_out_where_there_is_no_room(tiny, monkeypatch):
    _, module = tiny
    monkeypatch.setattr(two_layers, "SMALL_VOCABULARY", 16)
    least = sum(p.numel() * p.element_size() for p in module.model.layers[0].parameters()) * 2
    monkeypatch.setattr(measure, "device_available", lambda *_: 2 * (least + 20000))
    compute = measure.measure_layer(module, CPU, 1, 3)
    assert compute.layer_s > 0


def test_a_forward_that_fails_is_no_measurement(tiny, monkeypatch):
    _, module = tiny

    def fail(self, **inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(module), "forward", fail)
    with pytest.raises(NotMeasuredError, match="RuntimeError: no such kernel"):
        measure.measure_layer(module, CPU, 1, 1)


class Runs:
    """Forwards of made-up length: a layer takes `fixed` plus `each` for every token."""

    def __init__(self, fixed, each):
        self.fixed, self.each, self.counts = fixed, each, []
        self.units = [
            measure.Unit("embed", nn.Identity(), "embed", [], False, None),
            measure.Unit("layers.0", nn.Identity(), "layer=0", [], False, 0, "layers"),
            measure.Unit("layers.1", nn.Identity(), "layer=1", [], False, 1, "layers"),
        ]

    def __call__(self, count):
        self.counts.append(count)
        layer = self.fixed + self.each * count
        by_unit = {"embed": 0.002, "layers.0": layer, "layers.1": layer}
        return measure.ForwardTimes(2 * layer + 0.003, by_unit)


@pytest.mark.parametrize(("fixed", "each"), [(1e-4, 1e-6), (1e-3, 0.0)])
def test_short_forwards_run_at_full_length(fixed, each):
    runs = Runs(fixed, each)
    compute = measure._compute_of(runs, runs.units, 200)
    assert compute.layer_s == pytest.approx(fixed + 200 * each)
    assert compute.others == {"embed": 0.002}
    assert compute.rest_s == pytest.approx(0.001)
    assert compute.tokens == 200


def test_long_forwards_run_shorter_and_only_what_grows_is_scaled():
    runs = Runs(0.5, 0.25)
    compute = measure._compute_of(runs, runs.units, 4096)
    assert max(runs.counts) == compute.tokens == 16
    assert compute.layer_s == pytest.approx(0.5 + 4096 * 0.25)
    assert len(runs.counts) <= 4


def test_noise_never_shrinks_or_more_than_scales_what_is_extrapolated():
    assert measure._extrapolated((4, 5.0), (16, 4.0), 64) == 4.0
    assert measure._extrapolated((15, 0.0), (16, 4.0), 64) == pytest.approx(16.0)
    assert measure._extrapolated((1, 1.0), (1, 1.0), 4) == 1.0


# -- what is remembered ----------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / "measurements.json"


def test_entries_are_there_for_the_next_run(file):
    Measurements(file).put("disk", 2.5e9)
    other = Measurements(file)
    other.put("link", {"bytes_per_s": 1.0})
    again = Measurements(file)
    assert again.get("disk") == 2.5e9
    assert again.get("link") == {"bytes_per_s": 1.0}
    assert again.get("tape") is None
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.stat().st_mode & 0o777 == 0o600


def test_entries_that_others_write_meanwhile_are_kept(file):
    one, two = Measurements(file), Measurements(file)
    one.put("a", 1)
    two.put("b", 2)
    assert [Measurements(file).get(key) for key in "ab"] == [1, 2]


@pytest.mark.parametrize(("days", "value"), [(29, 7), (31, None), (-1, None)])
def test_entries_expire(file, monkeypatch, days, value):
    Measurements(file).put("disk", 7)
    now = time.time() + days * 86400
    monkeypatch.setattr(measurements.time, "time", lambda: now)
    assert Measurements(file).get("disk") == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"format": 1}', '{"format": 1, "entries": {"disk": 3}}'),
        '{"format": 1, "entries": {"disk": {"value": 1, "time": 1' + "0" * 400 + "}}}",
        *("\xff\x00", "[" * 100_000, " " * (measurements._MOST_BYTES + 1)),
    ],
    ids=lambda text: text[:40],
)
def test_a_damaged_file_is_said_and_replaced(file, caplog, text):
    file.parent.mkdir()
    file.write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "wsm_ext"):
        known = Measurements(file)
    assert known.get("disk") is None
    (record,) = caplog.records
    assert str(file) in record.getMessage()
    known.put("disk", 4)
    assert Measurements(file).get("disk") == 4


def test_a_pipe_in_the_files_place_is_not_waited_for(file, caplog):
    file.parent.mkdir()
    os.mkfifo(file)
    known = Measurements(file)
    assert "not a regular file" in caplog.text
    known.put("disk", 4)
    assert Measurements(file).get("disk") == 4


def test_an_entry_that_cannot_be_written_again_costs_only_a_line(file, caplog):
    file.parent.mkdir()
    deep = "[" * 900 + "]" * 900
    file.write_text('{"format": 1, "entries": {"a": {"value": ' + deep + ', "time": 1}}}')
    Measurements(file).put("disk", 4)
    assert "not kept" in caplog.text or Measurements(file).get("disk") == 4


def test_entries_of_another_format_are_not_read(file):
    Measurements(file).put("disk", 7)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "format": 2}))
    assert Measurements(file).get("disk") is None


def test_a_folder_that_cannot_be_written_costs_only_a_line(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    known = Measurements(tmp_path / "file" / "measurements.json")
    known.put("disk", 7)
    assert known.get("disk") == 7
    assert "not kept" in caplog.text


def test_the_file_lies_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measurements.cache_file() == tmp_path / "wsm_ext" / "measurements.json"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        expected = tmp_path / "home" / ".cache" / "wsm_ext" / "measurements.json"
        assert measurements.cache_file() == expected


MOUNTS = r"""22 1 253:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:21 / /proc rw,nosuid shared:5 - proc proc rw
30 22 259:1 / /models rw master:1 shared:2 - xfs /dev/nvme0n1p1 rw
31 30 259:2 / /models/with\040space rw - ext4 /dev/nvme1n1 rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/home/me/model", "/dev/vda ext4"),
        ("/models/llama/a.safetensors", "/dev/nvme0n1p1 xfs"),
        ("/modelsx", "/dev/vda ext4"),
        ("/models/with space/x", "/dev/nvme1n1 ext4"),
    ],
)
def test_a_file_system_is_named_by_its_mount(tmp_path, path, found):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system(measurements.Path(path), mounts) == found


def test_a_file_system_that_nothing_names_is_unknown(tmp_path):
    assert file_system(tmp_path, tmp_path / "none") == "unknown"


# -- measured, remembered or assumed ---------------------------------------------------------------


class Machine:
    """Measurements that cost nothing, and are counted."""

    def __init__(self, monkeypatch):
        self.counts = {"link": 0, "disk": 0, "layer": 0}
        self.mount = "/dev/nvme0n1 ext4"
        self.cached_share = 0.0
        self.paths = [measurements.Path("model.safetensors")]
        monkeypatch.setattr(rates, "file_system", lambda path: self.mount)
        monkeypatch.setattr(measure, "find_spans", self.spans)
        monkeypatch.setattr(measure, "measure_link", self.link)
        monkeypatch.setattr(measure, "measure_disk", self.disk)
        monkeypatch.setattr(measure, "measure_layer", self.layer)

    def spans(self, paths, direct):
        return [Span(paths[0], i, i < 10 * self.cached_share) for i in range(10)]

    def link(self, device):
        self.counts["link"] += 1
        return Link(20e9, 1e-6)

    def disk(self, spans, config):
        self.counts["disk"] += 1
        return measure.Disk(8e9 if spans[0].cached else 2e9)

    def layer(self, module, device, batch, tokens):
        self.counts["layer"] += 1
        return Compute(0.25, {"lm_head": 0.5}, 0.125, tokens)

    def gather(self, module=None, workload=(1, 8), **settings):
        module = nn.Linear(2, 2) if module is None else module
        config = Config.resolve(settings, environ={})
        return rates.gather(module, self.paths, CPU, config, workload)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_what_was_measured_is_not_measured_again(machine):
    first, second = machine.gather(), machine.gather()
    assert (first.disk.source, first.h2d.source, first.compute_source) == ("measured",) * 3
    assert (second.disk.source, second.h2d.source, second.compute_source) == ("cached",) * 3
    assert machine.counts == {"link": 1, "disk": 1, "layer": 1}
    assert second.disk.bytes_per_s == first.disk.bytes_per_s == pytest.approx(2e9)
    assert (second.h2d.bytes_per_s, second.copy_overhead_s) == (20e9, 1e-6)
    assert second.compute == first.compute == Compute(0.25, {"lm_head": 0.5}, 0.125, 8)
    assert first.host_computes


def test_another_file_system_or_workload_or_model_is_measured(machine):
    machine.gather()
    machine.mount = "/dev/sda1 xfs"
    assert machine.gather().disk.source == "measured"
    assert machine.gather(workload=(1, 9)).compute_source == "measured"
    assert machine.gather(nn.Identity()).compute_source == "measured"
    assert machine.gather(direct="off").disk.source == "measured"
    assert machine.gather(reader="pread").disk.source == "measured"
    assert machine.gather(read_threads=3).disk.source == "measured"
    assert machine.counts == {"link": 1, "disk": 5, "layer": 3}


def test_another_machine_or_version_is_measured(machine, monkeypatch):
    machine.gather()
    monkeypatch.setattr(measurements.platform, "node", lambda: "elsewhere")
    assert machine.gather().disk.source == "measured"
    monkeypatch.setattr(measurements, "__version__", "9.9")
    assert machine.gather().disk.source == "measured"


def test_a_disk_is_as_fast_as_what_is_cached_and_what_is_not_together(machine):
    machine.cached_share = 0.4
    found = machine.gather().disk
    assert found.bytes_per_s == pytest.approx(1 / (0.6 / 2e9 + 0.4 / 8e9))
    assert found.note == "40% in the page cache"
    machine.cached_share = 1.0
    assert machine.gather().disk.bytes_per_s == pytest.approx(8e9)
    assert machine.counts["disk"] == 2


def test_nothing_is_measured_where_settings_say_so(machine):
    found = machine.gather(measure=False)
    assert machine.counts == {"link": 0, "disk": 0, "layer": 0}
    assert (found.disk.known, found.h2d.known, found.compute) == (False, False, None)
    assert found.disk.bytes_per_s > 0


def test_without_a_workload_compute_is_not_measured(machine):
    found = machine.gather(workload=None)
    assert machine.counts["layer"] == 0
    assert (found.compute, "workload" in found.compute_note) == (None, True)


def test_what_cannot_be_measured_is_assumed_and_says_why(machine, monkeypatch):
    def fail(*_):
        raise NotMeasuredError("a reason")

    for name in ("measure_link", "measure_disk", "measure_layer"):
        monkeypatch.setattr(measure, name, fail)
    found = machine.gather()
    assert (found.disk.source, found.h2d.source, found.compute) == ("default", "default", None)
    assert [found.disk.note, found.h2d.note, found.compute_note] == ["a reason"] * 3


def test_weights_in_ram_are_read_as_fast_as_memory_is_copied(machine):
    machine.paths = []
    found = machine.gather().disk
    assert (found.bytes_per_s, machine.counts["disk"]) == (20e9, 0)
    assert "RAM" in found.note


@pytest.mark.parametrize(
    "value", [-1.0, "fast", {"a": 1}, [], float("nan"), 1e-300, 1e300, 10**400]
)
def test_a_damaged_entry_is_measured_anew(machine, value):
    machine.gather()
    known = Measurements()
    for key in list(json.loads(measurements.cache_file().read_text())["entries"]):
        known.put(key, value)
    found = machine.gather()
    assert (found.disk.bytes_per_s, found.h2d.bytes_per_s) == (pytest.approx(2e9), 20e9)
    assert found.compute == Compute(0.25, {"lm_head": 0.5}, 0.125, 8)
    assert machine.counts == {"link": 2, "disk": 2, "layer": 2}

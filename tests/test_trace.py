"""A trace is a timeline that is whole, true to the counters, and changes nothing."""

from __future__ import annotations

import contextlib
import json
import linecache
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens

import wsm_ext as wsm
from wsm_ext.runtime import trace
from wsm_ext.runtime.timeline import rates, rows_of
from wsm_ext.runtime.trace import usual_events

MIB = 1 << 20
SHAPE: dict[str, Any] = {"layers": 4, "hidden": 128}
# Every unit is loaded when it is asked for, and pushes out the one before: no byte moves between
# two passes, so that counters of the passes are those of the trace.
ON_DEMAND: dict[str, Any] = {
    "device_memory": 4 * MIB,
    "host_memory": 1 * MIB,
    "config": {
        "home_bytes": 0,
        "arena_bytes": 600 << 10,
        "lookahead_units": 0,
        "cpu_prefetch_distance": 0,
        "cpu_cache_cap_layers": 0,
        "chunk_mb": 0.125,
    },
}


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net(**SHAPE)


@pytest.fixture(scope="module")
def folder(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(net, tmp_path_factory.mktemp("net"), shards=2)


def stream(net: Net, folder: Path, device: torch.device, **changes: Any) -> wsm.StreamedModule:
    config = {**ON_DEMAND["config"], **changes.pop("config", {})}
    budgets = {**ON_DEMAND, **changes, "config": config}
    return wsm.stream(on_meta(net, **SHAPE), folder, device=device, **budgets)


def run(streamed: wsm.StreamedModule, device: torch.device) -> torch.Tensor:
    with torch.inference_mode():
        return streamed(tokens().to(device)).cpu()


def spans_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The spans by category, in the order of their begins. Checks what the format demands."""
    content = json.loads(path.read_text())
    events = content["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[dict[str, Any]]] = {}
    by_thread: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        assert event["pid"] == 1
        if event["ph"] == "C":
            assert event["args"]["GB/s"] >= 0
        if event["ph"] != "X":
            continue
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert event["tid"] in threads
        found.setdefault(event["cat"], []).append(event)
        by_thread.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in by_thread.values():  # beside or inside each other, or they cannot be drawn
        for (_, end), (begin, next_end) in zip(sorted(spans), sorted(spans)[1:], strict=False):
            assert begin >= end - 1e-3 or next_end <= end + 1e-3
    return {kind: sorted(spans, key=lambda span: span["ts"]) for kind, spans in found.items()}


def test_it_shows_every_unit_of_every_pass_and_counts_as_stats_do(
    device: torch.device, net: Net, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "trace.json"
    with stream(net, folder, device) as streamed:
        before_it = run(streamed, device)
        start = streamed.stats()["totals"]
        with streamed.trace(out):
            for _ in range(2):
                assert torch.equal(run(streamed, device), before_it)
        end = streamed.stats()["totals"]
        units = [unit.name for unit in streamed.plan.units if unit.streamed_bytes]
    assert len(units) == SHAPE["layers"] + 3
    spans = spans_of(out)
    assert sum(read["args"]["bytes"] for read in spans["read"]) == (
        end["disk_bytes"] - start["disk_bytes"]
    )
    assert sum(read["args"]["read_bytes"] for read in spans["read"]) == (
        end["disk_read_bytes"] - start["disk_read_bytes"]
    )
    assert sum(copy["args"]["bytes"] for copy in spans["copy"]) == (
        end["h2d_bytes"] - start["h2d_bytes"]
    )
    assert [span["name"] for span in spans["pass"]] == ["pass 1", "pass 2"]
    assert [span["name"] for span in spans["forward"]] == 2 * units
    for whole in spans["pass"]:
        ends = [(span["name"], span["ts"] + span["dur"] - whole["ts"]) for span in spans["forward"]]
        assert {name for name, end in ends if 0 <= end <= whole["dur"]} == set(units)
    # What is read and copied for a pass may come before it: in the pass before, and on a GPU, which
    # the host runs ahead of, before that has ended.
    for kind in ("read", "copy"):
        assert {span["name"] for span in spans[kind]} == set(units), kind
    for read in spans["read"]:
        assert read["args"]["file"] in os.listdir(folder)
        assert read["args"]["route"] in ("direct", "buffered")
        assert read["args"]["into"] == "slot"
    assert {wait["name"] for wait in spans["host_wait"]} <= {"disk", "arena", "h2d"}
    assert {wait["args"]["unit"] for wait in spans["host_wait"]} <= set(units)
    assert str(folder) not in out.read_text()
    assert str(tmp_path) not in out.read_text()


def test_reads_into_the_host_cache_say_so(net: Net, folder: Path, tmp_path: Path) -> None:
    out, cpu = tmp_path / "trace.json", torch.device("cpu")
    cached = {"cpu_cache_cap_layers": None, "direct": "off"}
    streamed = stream(net, folder, cpu, host_memory=8 * MIB, config=cached)
    with streamed, streamed.trace(out):
        run(streamed, cpu)
    reads = spans_of(out)["read"]
    assert {(read["args"]["into"], read["args"]["route"]) for read in reads} == {
        ("cache", "buffered")
    }


def test_weights_in_ram_are_named_by_their_parameters(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    streamed = wsm.stream(make_net(**SHAPE), device="cpu", **ON_DEMAND)
    with streamed, streamed.trace(out):
        run(streamed, torch.device("cpu"))
    reads = spans_of(out)["read"]
    assert {read["args"]["route"] for read in reads} == {"memory"}
    assert "layers.0.mlp.0.weight" in {read["args"]["file"] for read in reads}


def test_only_one_at_a_time_and_only_while_it_streams(
    net: Net, folder: Path, tmp_path: Path
) -> None:
    cpu, out = torch.device("cpu"), tmp_path / "trace.json"
    streamed = stream(net, folder, cpu)
    with streamed.trace(out):
        with pytest.raises(RuntimeError, match="is being taken"), streamed.trace(tmp_path / "b"):
            pass
        with pytest.raises(RuntimeError, match="end the trace first"):
            streamed.resize(device_memory=8 * MIB)
        run(streamed, cpu)
    assert len(spans_of(out)["pass"]) == 1
    with streamed.trace(out):  # another one, and the file is replaced
        pass
    assert "pass" not in spans_of(out)
    handle = wsm.handle(streamed)
    handle.close()
    with pytest.raises(RuntimeError, match="is closed"), handle.trace(out):
        pass
    assert os.listdir(tmp_path) == ["trace.json"]


def test_a_target_that_cannot_be_written_is_refused_at_once(
    net: Net, folder: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with stream(net, folder, torch.device("cpu")) as streamed:
        for target, error in (
            (tmp_path / "missing" / "trace.json", FileNotFoundError),
            (tmp_path, ValueError),
            (tmp_path / "pipe", ValueError),
        ):
            with pytest.raises(error, match="a trace cannot be written"), streamed.trace(target):
                pytest.fail("it began")
        with pytest.raises(ValueError), streamed.trace(tmp_path / "t", most_events=0):
            pytest.fail("it began")
        with streamed.trace(tmp_path / "trace.json"):
            pass


def test_the_file_appears_whole_or_not_at_all(
    net: Net, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError("the disk is full")

    out = tmp_path / "trace.json"
    out.write_text("what was there")
    with stream(net, folder, torch.device("cpu")) as streamed:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(OSError, match="the disk is full"), streamed.trace(out):
                run(streamed, torch.device("cpu"))
        assert out.read_text() == "what was there"
        assert os.listdir(tmp_path) == ["trace.json"]
        with streamed.trace(out):
            run(streamed, torch.device("cpu"))
    assert len(spans_of(out)["pass"]) == 1


def test_what_happened_before_an_error_or_a_close_is_written(
    net: Net, folder: Path, tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    streamed = stream(net, folder, cpu)
    with pytest.raises(IndexError), streamed.trace(tmp_path / "error.json"):
        streamed(torch.tensor([[10**6]]))
    with streamed.trace(tmp_path / "close.json"):
        run(streamed, cpu)
        streamed.close()
        assert (tmp_path / "close.json").exists()  # nothing keeps the engine's memory
    for name in ("error.json", "close.json"):
        assert len(spans_of(tmp_path / name)["pass"]) == 1


def test_weights_in_ram_come_back_though_a_trace_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(trace, "write_atomically", refuse)
    module, cpu = make_net(**SHAPE), torch.device("cpu")
    before = {name: (p, p.detach().clone()) for name, p in module.named_parameters()}
    in_cache = {**ON_DEMAND["config"], "cpu_cache_cap_layers": None}
    budgets = {**ON_DEMAND, "host_memory": 8 * MIB, "config": in_cache}
    streamed = wsm.stream(module, device="cpu", **budgets)
    handle = wsm.handle(streamed)
    assert any(p.numel() == 0 for p, _ in before.values())  # the module has let them go
    run(streamed, cpu)
    with pytest.raises(OSError, match="the disk is full"), streamed.trace(tmp_path / "trace.json"):
        streamed.close()
    after = dict(module.named_parameters())
    assert list(after) == list(before)
    for name, (parameter, values) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, values), name
    assert handle.stats()["passes"] == 1
    handle.close()


def test_a_relative_path_is_that_of_the_begin(
    net: Net, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    with stream(net, folder, torch.device("cpu")) as streamed, streamed.trace("trace.json"):
        monkeypatch.chdir(elsewhere)
        run(streamed, torch.device("cpu"))
    assert len(spans_of(here / "trace.json")["pass"]) == 1
    assert os.listdir(elsewhere) == []


def in_a_block(streamed: wsm.StreamedModule, out: Path) -> None:
    with streamed.trace(out, most_events=5):
        run(streamed, torch.device("cpu"))


def in_a_stack(streamed: wsm.StreamedModule, out: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(streamed.trace(out, most_events=5))
        run(streamed, torch.device("cpu"))


def by_close(streamed: wsm.StreamedModule, out: Path) -> None:
    with streamed.trace(out, most_events=5):
        run(streamed, torch.device("cpu"))
        streamed.close()


def by_leaving(streamed: wsm.StreamedModule, out: Path) -> None:
    with streamed.trace(out, most_events=5), streamed:
        run(streamed, torch.device("cpu"))


@pytest.mark.parametrize(
    ("end", "line"),
    [
        (in_a_block, "with streamed.trace"),
        (in_a_stack, "with contextlib.ExitStack"),
        (by_close, "streamed.close()"),
        (by_leaving, "with streamed.trace"),
    ],
)
def test_the_warning_of_a_full_trace_points_at_what_ends_it(
    net: Net,
    folder: Path,
    tmp_path: Path,
    end: Callable[[wsm.StreamedModule, Path], None],
    line: str,
) -> None:
    streamed = stream(net, folder, torch.device("cpu"))
    missing = pytest.warns(UserWarning, match="later events are missing")
    with streamed, missing as warned:
        end(streamed, tmp_path / "trace.json")
    (warning,) = warned
    assert warning.filename == __file__
    assert line in linecache.getline(__file__, warning.lineno)


def test_a_full_trace_says_what_is_missing(net: Net, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    streamed = stream(net, folder, torch.device("cpu"))
    missing = pytest.warns(UserWarning, match="later events are missing")
    with streamed, missing, streamed.trace(out, most_events=5):
        run(streamed, torch.device("cpu"))
    assert sum(map(len, spans_of(out).values())) <= 5
    content = json.loads(out.read_text())
    dropped = content["otherData"]["dropped_events"]
    assert dropped > 5
    (instant,) = (event for event in content["traceEvents"] if event["ph"] == "i")
    assert str(dropped) in instant["name"]


def test_where_nothing_streams_it_says_so(net: Net, folder: Path, tmp_path: Path) -> None:
    streamed = wsm.stream(on_meta(net, **SHAPE), folder, device="cpu", device_memory=64 * MIB)
    nothing = pytest.warns(UserWarning, match="nothing to show")
    with streamed, nothing, streamed.trace(tmp_path / "trace.json"):
        run(streamed, torch.device("cpu"))
    assert spans_of(tmp_path / "trace.json") == {}


def test_rows() -> None:
    spans = [(0, 10), (2, 4), (3, 12), (4, 6), (10, 11), (11, 13)]
    assert rows_of(spans) == [0, 1, 2, 1, 0, 0]
    # Inside, beside, and across the end of the outer one.
    assert rows_of([(0, 10), (2, 4), (4, 10), (6, 9), (8, 12)], nested=True) == [0, 0, 0, 0, 1]
    assert rows_of([]) == []


def test_rates_share_bytes_out_over_windows() -> None:
    assert rates([(0, 10, 100), (5, 25, 200)], 10, 30) == [15.0, 10.0, 5.0, 0.0]
    assert rates([(7, 7, 50)], 10, 9) == [5.0]
    assert rates([], 10, 25) == [0.0, 0.0, 0.0]


def test_room_for_two_passes_is_made():
    assert usual_events(10, 3) == 1 << 15
    assert usual_events(100_000, 80) == 2 * (200_000 + 320)
    assert usual_events(10**6, 80) == 1 << 19

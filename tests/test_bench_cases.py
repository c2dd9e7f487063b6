"""The benchmarks' cases, peers and charts on models of a few MB: what they count, and what they
say when a figure must not stand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from waits import LIMIT_S, wait_until

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import bars
import cases
import chart
import coldness
import cuptitrace
import forward
import passes
import peers
import scaling
from by_hand import TwoBuffers
from cases import disk
from context import Context

from wsm_ext.hf.synthetic import make_llama_checkpoint

CPU = torch.device("cpu")
TINY = {"hidden": 64, "intermediate": 176, "heads": 4, "kv_heads": 2, "vocab": 512}


def arguments(folder: Path, case: str, *words: str) -> list[str]:
    sizes = ["--preset", "tiny", "--layers", "3", "--device", "cpu", "--folder", str(folder)]
    budgets = ["--staging", "2MiB", "--chunk-mb", "0.25", "--leaf-arena", "1MiB"]
    work = ["--shapes", "1x4", "--compute-shape", "2x8", "--passes", "2", "--repeats", "1"]
    return ["--case", case, *sizes, *budgets, *work, *words]


# -- bars ------------------------------------------------------------------------------------------


def test_a_figure_is_judged_by_the_sense_of_its_bar() -> None:
    assert bars.judge(1, {"figure": 0.985})["verdict"] == "met"
    assert bars.judge(1, {"figure": 0.984})["verdict"] == "MISSED"
    assert bars.judge(2, {"figure": 1.02})["verdict"] == "met"
    assert bars.judge(2, {"figure": 1.03})["verdict"] == "MISSED"


def test_a_figure_that_breaks_a_condition_misses_its_bar() -> None:
    kept = {"figure": 1.2, "conditions": {"below 0.95": True}}
    assert bars.judge(11, kept)["verdict"] == "met"
    broken = {"figure": 1.2, "conditions": {"below 0.95": False}}
    assert bars.judge(11, broken)["verdict"] == "MISSED (below 0.95)"


@pytest.mark.parametrize("how", ["skipped", "failed"])
def test_a_case_without_a_figure_says_why(how: str) -> None:
    verdict = bars.judge(8, {how: "no GPU"})
    assert (verdict["figure"], verdict["verdict"]) == (None, how)
    assert bars.rows([verdict])[0][2:] == ("-", ">= 6", f"{how}: no GPU")


def test_every_bar_has_a_case() -> None:
    assert {case.number for case in cases.CASES if case.number} == set(bars.BARS)
    assert [case.name for case in cases.find("12,disk,1")] == ["busy", "disk", "ram"]
    with pytest.raises(ValueError, match="unknown case 13, nothing; known: 1 ram, 2 compute"):
        cases.find("1,13,nothing")


# -- measures --------------------------------------------------------------------------------------


def test_kernels_that_overlap_are_busy_once() -> None:
    assert cuptitrace.union_us([(0, 10), (5, 12), (20, 30), (21, 22)]) == 22
    events = [
        {"cat": "kernel", "ts": 0, "dur": 10},
        {"cat": "kernel", "ts": 5, "dur": 5},
        {"cat": "gpu_memcpy", "ts": 10, "dur": 10},
        {"cat": "kernel", "ts": 20, "dur": 20},
    ]
    share = cuptitrace.busy_share(events)
    assert (share["busy_us"], share["wall_us"], share["share"]) == (30, 40, 0.75)
    with pytest.raises(RuntimeError, match="no kernel"):
        cuptitrace.busy_share([{"cat": "gpu_memcpy", "ts": 0, "dur": 1}])


def test_copies_have_a_rate_by_themselves_and_one_with_what_lies_between_them() -> None:
    def copy(ts: float, dur: float, nbytes: int, name: str = "Memcpy HtoD") -> dict[str, Any]:
        return {
            "cat": "gpu_memcpy",
            "name": name,
            "ts": ts,
            "dur": dur,
            "args": {"bytes": nbytes},
        }

    events = [copy(30, 10, 400_000), copy(0, 10, 400_000), copy(50, 9, 5, "Memcpy DtoH")]
    rates = cuptitrace.copy_rates([*events, {"cat": "kernel", "ts": 0, "dur": 99}])
    assert rates == {"copies": 2, "gb_per_s_busy": 40.0, "gb_per_s_wall": 20.0}
    with pytest.raises(RuntimeError, match="no copy"):
        cuptitrace.copy_rates(events[2:])


def test_runs_alternate_and_their_order_turns() -> None:
    order: list[str] = []
    tick = itertools.count()

    def sample(name: str) -> float:
        order.append(name)
        return next(tick)

    got = passes.alternate({"a": lambda: sample("a"), "b": lambda: sample("b")}, 3)
    assert "".join(order) == "abbaab"
    assert got == {"a": [0, 3, 4], "b": [1, 2, 5]}


def test_cases_on_a_small_model_leave_records_with_verdicts(tmp_path: Path) -> None:
    out = tmp_path / "cases.json"
    words = arguments(tmp_path / "model", "2,9,10,11,8,resident", "--json", str(out))
    assert forward.main(words) == 0
    records = {record["case"]: record["results"] for record in json.loads(out.read_text())}
    assert list(records) == ["compute", "wrapper", "swap", "leaf", "pinning", "resident"]
    assert records["compute"]["all_layers_stream"]
    assert records["wrapper"]["conditions"] == {"other bits than the plain model's": True}
    assert 0 < records["swap"]["figure"] < 10_000
    leaf = records["leaf"]
    assert leaf["plan"]["arena_bytes"] <= 1 << 20
    moved, model = leaf["runs"]["1x1"]["bytes_per_pass"], leaf["plan"]["model_bytes"]
    assert moved == pytest.approx(model, rel=0.4)  # the next pass is prefetched in this one
    assert "needs --device cuda" in records["pinning"]["skipped"]
    for name, results in records.items():
        assert ("verdict" in results) == (name != "resident")


def test_a_case_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Context) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Context, "disk_ceiling", fail)
    out = tmp_path / "cases.json"
    words = arguments(tmp_path / "model", "disk,swap", "--json", str(out))
    assert forward.main(words) == 1
    first, second = (record["results"] for record in json.loads(out.read_text()))
    assert first["verdict"]["why"] == "OSError: the disk is gone"
    assert second["verdict"]["verdict"] in ("met", "MISSED")


class Disk:
    """A disk whose rate is known: half as fast into memory that no cache holds."""

    def __init__(self, into: int) -> None:
        self.best = {"GB_per_s": 1.0 if into else 2.0}

    def sample(self, count: int) -> None:
        assert count > 0


def test_half_cached_reads_the_other_half_and_is_judged_by_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.coldness, "make_cold", lambda shards: {s.name: 0 for s in shards})
    monkeypatch.setattr(Context, "disk_ceiling", lambda self, into=0: Disk(into))
    words = arguments(tmp_path, "half", "--disk-shapes", "1x1", "--disk-passes", "3")
    context = Context(forward.parse_arguments(words))
    results = disk.half_cached(context)
    plan, run = results["plan"], results["runs"]["1x1"]
    assert all(results["conditions"].values())
    assert plan["disk_home_bytes"] / plan["model_bytes"] == pytest.approx(0.5, abs=0.06)
    # The time of a pass over that of its bytes at the disk's 2 GB/s.
    over = [one["seconds"] / (one["disk_bytes"] / 2e9) for one in run["runs"]]
    assert results["figure"] == pytest.approx(statistics.median(over))
    assert run["ratio_large"] == pytest.approx(2 * run["ratio"])


def test_a_process_is_timed_until_it_says_the_word() -> None:
    said: list[str] = []
    command = [sys.executable, "-c", "print('output after all')"]
    assert disk.seconds_until("output", command, said) > 0
    assert said == ["after all"]
    with pytest.raises(RuntimeError, match="boom"):
        disk.seconds_until("output", [sys.executable, "-c", "raise SystemExit('boom')"])


# -- peers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama_checkpoint(tmp_path_factory.mktemp("odd"), layers=3, **TINY)


@pytest.mark.parametrize("name", ["two buffers", "wsm arena"])
def test_peers_compute_what_the_model_does(odd_model: Path, name: str) -> None:
    job = peers.Job(odd_model, odd_model, CPU, [(1, 4)])
    wanted_of, got_of = job.plain(), peers.PEERS[name].make(job)
    with torch.inference_mode():
        for step in range(4):  # an odd number of layers: the places change roles every pass
            ids = torch.randint(0, 512, (2, 3 + step))
            wanted, got = (m(input_ids=ids, use_cache=False).logits for m in (wanted_of, got_of))
            assert torch.equal(wanted, got)
    if hasattr(got_of, "close"):
        got_of.close()


def test_two_buffers_hold_no_more_than_two_layers(odd_model: Path) -> None:
    layers = peers.Job(odd_model, odd_model, CPU, []).plain().model.layers
    sizes = {sum(p.numel() for p in layer.parameters()) for layer in layers}
    streamed = TwoBuffers(layers, CPU)
    assert [place.numel() for place in streamed.places] == 2 * list(sizes)
    assert sum(p.numel() for p in layers.parameters()) == 0


def test_a_peer_is_measured_by_the_layers_bytes(odd_model: Path) -> None:
    got = peers.measure("two buffers", peers.Job(odd_model, odd_model, CPU, [(1, 4)]), passes=2)
    run = got["runs"]["1x4"]
    nbytes = run["layers_GB_per_s"] * 1e9 * run["seconds_per_pass"]["median"]
    hidden, wide = TINY["hidden"], TINY["intermediate"]
    layer = 3 * hidden * wide + 2 * hidden * hidden + 2 * hidden * hidden // 2 + 2 * hidden
    assert nbytes == pytest.approx(3 * layer * 2)


def test_a_peer_that_takes_too_long_or_fails_says_so(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"device": "cpu", "shapes": [(1, 1)], "passes": 1}
    late = peers.run_peer("resident", tmp_path, limit_s=0.01, **settings)
    assert late["failed"] == "not done after 0.01 s"
    broken = peers.run_peer("resident", tmp_path / "none", limit_s=LIMIT_S, **settings)
    assert "none" in broken["failed"]
    assert "Traceback" in "".join(broken["said"])
    assert str(tmp_path) not in json.dumps(broken)


class StartsSlowly(subprocess.Popen):  # type: ignore[type-arg]
    """Its time limit counts from when it has done its first shape."""

    def wait(self, timeout: float | None = None) -> int:
        assert isinstance(self.args, list)
        out = Path(self.args[self.args.index("--json") + 1])
        if timeout is not None:
            wait_until(lambda: out.exists() or self.poll() is not None, "the first shape")
        return super().wait(timeout)


@pytest.mark.parametrize(
    ("ending", "limit_s", "why"),
    [
        ("time.sleep(600)", 0.1, "not done after 0.1 s"),
        ("raise SystemExit('out of memory')", LIMIT_S, "out of memory"),
        ("os.kill(os.getpid(), 9)", LIMIT_S, "status -9"),
    ],
)
def test_a_peer_that_is_cut_off_keeps_the_shapes_it_has_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, limit_s: float, why: str
) -> None:
    script = tmp_path / "child.py"
    head = "import json, os, pathlib, subprocess, sys, time"
    out = "out = pathlib.Path(sys.argv[sys.argv.index('--json') + 1])"
    write = "out.with_suffix('.part').write_text(json.dumps({'runs': {'1x1': 5}}))"
    show = "out.with_suffix('.part').rename(out)"
    left = "subprocess.Popen(['sleep', '600'])"
    script.write_text("\n".join([head, out, write, show, left, ending]))
    monkeypatch.setattr(peers, "__file__", str(script))
    monkeypatch.setattr(peers.subprocess, "Popen", StartsSlowly)
    settings: dict[str, Any] = {"device": "cpu", "shapes": [(1, 1)], "passes": 1}
    got = peers.run_peer("resident", tmp_path, limit_s=limit_s, **settings)
    assert got["runs"] == {"1x1": 5}
    assert got["cut"] == why


def test_a_disk_peer_reads_files_that_are_cold(odd_model: Path, tmp_path: Path) -> None:
    if coldness.on_tmpfs(tmp_path):
        pytest.skip("the temporary folder is memory")
    job = peers.Job(odd_model, tmp_path, CPU, [(1, 4), (1, 8)])
    got = peers.measure("wsm disk", job, passes=3)
    assert list(got["runs"]) == ["1x4"]
    assert got["runs"]["1x4"]["cached_bytes"] == 0
    own = tmp_path / "copy.safetensors"
    own.write_bytes(bytes(2 << 20))
    assert job.cached_bytes() == 2 << 20
    job.cool()
    assert job.cached_bytes() == 0


def test_logits_are_compared_with_the_resident_models() -> None:
    def runs(*logits: float) -> dict[str, Any]:
        return {"runs": {"1x1": {"logits": list(logits)}}}

    results = {"a": runs(1, -4), "resident": runs(1, -8), "b": {"failed": "so"}}
    peers.compare_logits(results, ["1x1", "1x8"])
    assert results["a"]["runs"]["1x1"]["logits_off"] == 0.5
    assert results["resident"]["runs"]["1x1"]["logits_off"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_never_the_same(
    bad: float, capsys: pytest.CaptureFixture[str]
) -> None:
    def peer(**logits: list[float]) -> dict[str, Any]:
        figures = {"seconds_per_pass": {"median": 1.0}, "layers_GB_per_s": 1.0}
        return {"load_s": 1.0, "runs": {n: {**figures, "logits": v} for n, v in logits.items()}}

    good = {"a": [1.0, -4.0], "b": [2.0, 3.0]}
    wrong = [{**good, name: values} for name in good for values in ([bad, 3.0], [2.0, bad])]
    for results in (
        *({"resident": peer(**good), "other": peer(**logits)} for logits in wrong),
        *({"resident": peer(**logits)} for logits in wrong),
    ):
        peers.compare_logits(results, ["a", "b"])
        peers.table(results, ["a", "b"])
        printed = capsys.readouterr().out
        assert printed.count("off by inf\n") == 1
        assert printed.count("same\n") == len(results) - 1


def test_paths_are_left_out_of_what_is_published() -> None:
    said = 'File "/a/b.d/c-1/peers.py", line 3: see https://x.org/y/z or /srv/model, not 1/2'
    assert peers.no_paths(said) == (
        'File "…/peers.py", line 3: see https://x.org/y/z or …/model, not 1/2'
    )


def peers_command(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> int:
    sizes = ["--preset", "tiny", "--layers", "3", "--device", "cpu", "--shapes", "1x4,2x4"]
    command = ["peers.py", "--folder", str(folder / "model"), *sizes, *words]
    monkeypatch.setattr(sys, "argv", command)
    return peers.main()


def test_peers_make_a_table_a_record_and_a_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "peers.json", tmp_path / "peers.svg"
    words = ["--peers", "wsm arena,resident,mmgp", "--json", str(out), "--plot", str(plot)]
    assert (
        peers_command(monkeypatch, tmp_path, *words, "--disk-folder", str(tmp_path / "disk")) == 0
    )
    printed = capsys.readouterr().out
    assert "mmgp: needs a GPU" in printed
    assert printed.count("same\n") == 2
    (record,) = json.loads(out.read_text())
    assert record["results"]["wsm arena"]["runs"]["2x4"]["logits_off"] < 0.01
    assert record["environment"]["transformers"]
    assert "wsm arena" in plot.read_text()
    assert not list((tmp_path / "disk").iterdir())


def test_peers_stop_when_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--peers", "wsm arena,two buffers", "--total-s", "1"]
    assert peers_command(monkeypatch, tmp_path, *words, "--json", str(tmp_path / "x.json")) == 0
    assert capsys.readouterr().out.count("not begun: the 1 s for all are over") == 2
    assert (tmp_path / "x.json").is_file()


def test_only_a_failure_of_ours_is_one_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status(device: str, peer: str, *words: str) -> int:
        monkeypatch.setattr(peers.torch, "device", lambda _: argparse.Namespace(type=device))
        return peers_command(monkeypatch, tmp_path, "--peers", peer, *words)

    monkeypatch.setattr(peers, "run_peer", lambda *_, **__: {"failed": "out of memory"})
    monkeypatch.setattr(peers.Record, "write", lambda _: None)
    monkeypatch.setattr(peers.shapes, "ensure_checkpoint", lambda *_: None)
    for device in ("cuda", "cpu"):
        assert status(device, "wsm arena,two buffers") == 1
        assert status(device, "two buffers") == 0
        assert status(device, "wsm arena", "--total-s", "1") == 0
    assert status("cpu", "wsm 16 GiB") == 0


# -- costs and charts ------------------------------------------------------------------------------


def test_order_of_growth() -> None:
    assert scaling.orders({10: 1.0, 100: 10.0, 1000: 1000.0}) == {"10 to 100": 1, "100 to 1000": 2}


def test_synthetic_models_plan_and_construct(tmp_path: Path) -> None:
    for compared in (False, True):
        planned = scaling.synthetic_plan(10, compared)()
        assert planned.model_bytes == 10 * scaling.TENSORS * 4 << 20
        assert planned.disk_home_bytes > 0 < planned.host_home_bytes
    file = tmp_path / "chain.safetensors"
    width = scaling.WIDTH
    save_file({f"layers.{i}.weight": torch.zeros(width, width) for i in range(100)}, file)
    got = scaling.construct_child(100, file, traced=True)
    assert got["python_bytes"] > 100 * 100
    assert got["weights_bytes"] == 100 * width * width * 4


def peers_record(shapes: str = "1x2048", **seconds: float) -> dict[str, Any]:
    def runs(each: float) -> dict[str, Any]:
        return {"runs": {name: {"seconds_per_pass": {"median": each}} for name in shapes.split()}}

    return {
        "benchmark": "peers",
        "environment": {"gpu": {"name": "GPU X"}, "date": "2026-01-02T03:04:05"},
        "checkpoint": {"preset": "70b", "layers": 12},
        "results": {**{who: runs(s) for who, s in seconds.items()}, "broken": {"failed": "so"}},
    }


def test_charts_are_drawn_from_records(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "peers.svg"
    record = peers_record("1x1 1x2048 8x2048", wsm=0.151, other=0.4, slow=12.5, resident=0.0125)
    record["results"]["some"] = peers_record("1x1", some=0.2)["results"]["some"]
    chart.draw([record], out)
    drawn = out.read_text()
    rows = ("wsm", "other", "slow", "some", "151 ms", "12.50 s", "all on the GPU: 12.5 ms")
    around = ("1 token", "2048 tokens", "8 x 2048 tokens", "12 layers of 70B", "GPU X, 2026-01-02")
    assert [text for text in (*rows, *around) if text not in drawn] == []
    assert drawn.count("151 ms") == 3
    assert drawn.count("200 ms") == 1
    assert "broken" not in drawn
    first = out.read_bytes()
    chart.draw([record], out)
    assert out.read_bytes() == first

    case = {**peers_record(), "benchmark": "forward"}
    verdicts = [bars.judge(1, {"figure": 0.99}), bars.judge(8, {"skipped": "no GPU"})]
    chart.draw([{**case, "results": {"verdict": verdict}} for verdict in verdicts], out)
    drawn = out.read_text()
    assert "0.99 (bar &gt;= 0.985)" in drawn
    assert "pinning" not in drawn


def budgets_record(*shares: int) -> dict[str, Any]:
    runs = [
        {
            "share": share,
            "seconds_per_pass": 3.3 - share / 40,
            "floors": {"disk_s": 3.2 - share / 40, "h2d_s": 0.5, "compute_s": 0.1},
        }
        for share in shares
    ]
    return {
        "benchmark": "budgets",
        "environment": {"gpu": None, "date": "2026-11-23"},
        "results": {"runs": runs},
    }


def test_budgets_are_drawn_beside_the_slowest_link(tmp_path: Path) -> None:
    out = tmp_path / "budgets.svg"
    chart.draw([budgets_record(0, 50, 100)], out)
    drawn = out.read_text()
    for text in ("the slowest link alone", "wsm, measured", "% of the model in RAM"):
        assert text in drawn


def test_a_chart_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run"):
        chart.draw_budgets(budgets_record(), tmp_path / "x.svg")
    for nobody in (peers_record(), peers_record(resident=0.1)):
        with pytest.raises(ValueError, match="no peer"):
            chart.draw_peers(nobody, tmp_path / "x.svg")
    with pytest.raises(ValueError, match="no case"):
        chart.draw_cases([{"results": {}}], tmp_path / "x.svg")


def test_shapes_of_a_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = forward.parse_arguments(["--folder", "f", "--shapes", "8x2048,1x1"])
    assert isinstance(parsed, argparse.Namespace)
    assert parsed.shapes == [(8, 2048), (1, 1)]
    with pytest.raises(SystemExit):
        forward.parse_arguments(["--folder", "f", "--shapes", "8x"])
    assert "--shapes" in capsys.readouterr().err

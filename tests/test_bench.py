"""The benchmarks' own helpers: a benchmark that measures wrongly is worse than none."""

from __future__ import annotations

import json
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import coldness
import harness
import rss
import shapes

PAGE = mmap.PAGESIZE
CPU = torch.device("cpu")


@pytest.fixture
def disk_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(64 * PAGE + 5))
    if coldness.on_tmpfs(path):
        pytest.skip("the temporary folder lies on tmpfs, which cannot be cold")
    return path


def warm(path: Path) -> None:
    path.read_bytes()


def test_cachestat_and_mincore_agree_on_a_warm_file(disk_file: Path) -> None:
    warm(disk_file)
    assert coldness.cached_pages(disk_file, "mincore") == 65
    try:
        assert coldness.cached_pages(disk_file, "cachestat") == 65
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("method", ["auto", "mincore"])
def test_make_cold_drops_even_what_was_just_written(disk_file: Path, method: str) -> None:
    warm(disk_file)
    assert coldness.cached_pages(disk_file, method) > 0
    assert coldness.make_cold([disk_file]) == {"data.bin": 0}
    assert coldness.cached_pages(disk_file, method) == 0


def test_a_file_that_stays_cached_is_refused(disk_file: Path) -> None:
    with (
        open(disk_file, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
    ):
        assert view[PAGE] == disk_file.read_bytes()[PAGE]  # a mapped page cannot be dropped
        with pytest.raises(coldness.NotColdError, match=r"data\.bin"):
            coldness.make_cold([disk_file], attempts=2)


def test_tmpfs_is_refused() -> None:
    folder = Path("/dev/shm")
    if not (folder.is_dir() and os.access(folder, os.W_OK) and coldness.on_tmpfs(folder)):
        pytest.skip("no tmpfs at /dev/shm")
    path = folder / f"wsm-bench-test-{os.getpid()}"
    path.write_bytes(b"x" * PAGE)
    try:
        with pytest.raises(coldness.NotColdError, match="tmpfs"):
            coldness.make_cold([path])
    finally:
        path.unlink()


def test_bandwidth_ratio() -> None:
    assert harness.bandwidth_ratio(55e9, 1.0, 55.0) == pytest.approx(1.0)
    assert harness.bandwidth_ratio(20.5e9, 0.5, 50.0) == pytest.approx(0.82)


@pytest.mark.parametrize("values", [(0, 1.0, 1.0), (1, 0.0, 1.0), (1, 1.0, 0.0), (-1, 1.0, 1.0)])
def test_bandwidth_ratio_refuses_nothing_measured(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="no ratio"):
        harness.bandwidth_ratio(*values)


def read_report(*cells: tuple[str, str, float]) -> dict[str, object]:
    return {
        "cells": [
            {"reader": reader, "block_bytes": 1, "depth": 1, "mode": mode, "GB_per_s": rate}
            for reader, mode, rate in cells
        ]
    }


def test_the_disks_ceiling_is_the_best_median_not_the_best_sample() -> None:
    reports = [
        read_report(
            ("uring", "direct", 2.0), ("pread", "direct", 9.0), ("pread", "buffered", 99.0)
        ),
        read_report(("uring", "direct", 2.1), ("pread", "direct", 1.0)),
        read_report(("uring", "direct", 2.2), ("pread", "direct", 1.1)),
    ]
    best = harness.merge_cells(reports, "direct")
    assert (best["reader"], best["GB_per_s"]) == ("uring", 2.1)
    assert harness.merge_cells(reports, "buffered")["GB_per_s"] == 99.0


def test_a_cell_is_not_best_by_its_own_luck() -> None:
    lucky = [(3.0, 2.0, 2.0), (2.0, 3.0, 2.0), (2.0, 2.0, 3.0), (2.0, 2.0, 2.0)]
    names = ("uring", "pread", "other")
    reports = [
        read_report(*((name, "direct", rate) for name, rate in zip(names, rates, strict=True)))
        for rates in lucky
    ]
    assert harness.merge_cells(reports, "direct")["unlucky_GB_per_s"] == 2.0
    # One that is always the best is taken with all its samples.
    steady = [read_report(("uring", "direct", 2.0 + i), ("pread", "direct", 1.0)) for i in range(4)]
    assert harness.merge_cells(steady, "direct")["unlucky_GB_per_s"] == 3.5


def test_the_rate_of_a_stretch_of_samples(tmp_path: Path) -> None:
    (tmp_path / "bench_read").touch()
    disk = harness.DiskCeiling(tmp_path / "bench_read", tmp_path, 1, "small")
    disk.reports = [
        read_report(("uring", "direct", 2.0 + i), ("pread", "direct", 1.0)) for i in range(6)
    ]
    assert disk.rate_between(0, 2) == 2.5
    assert disk.rate_between(4, 6) == 6.5


def test_a_ceiling_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="no direct cell"):
        harness.merge_cells([read_report(("pread", "buffered", 1.0))], "direct")


def test_results_are_written_whole_with_their_environment(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    harness.write_results(path, [harness.result("forward", "ram", CPU, {"ratio": 0.98})])
    (record,) = json.loads(path.read_text())
    assert record["results"] == {"ratio": 0.98}
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["cpu_count"] >= 1
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_a_result_that_lacks_something_is_refused(tmp_path: Path) -> None:
    record = harness.result("forward", "ram", CPU, {})
    del record["environment"]["kernel"]
    with pytest.raises(ValueError, match="kernel"):
        harness.write_results(tmp_path / "r.json", [record])
    with pytest.raises(ValueError, match="results"):
        harness.write_results(
            tmp_path / "r.json", [{"benchmark": "b", "case": "c", "environment": {}}]
        )
    assert not list(tmp_path.iterdir())


def test_published_commands_name_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["/home/someone/bench/forward.py", "--folder", "/data/x/llama"]
    )
    command = harness.environment(CPU)["command"]
    assert command == "python bench/forward.py --folder …/llama"


def test_link_ceiling_on_the_host_device() -> None:
    link = harness.LinkCeiling(CPU, chunk_bytes=1 << 16, total_bytes=1 << 20)
    link.sample(3)
    assert len(link.gb_per_s) == 3
    assert link.median > 0


def test_link_ceiling_notices_wrong_bytes() -> None:
    link = harness.LinkCeiling(CPU, chunk_bytes=1 << 16, total_bytes=1 << 20)
    link.source = link.source.clone()
    copy_all = link._copy_all

    def corrupt() -> None:
        copy_all()
        link.target[-1] += 1

    link._copy_all = corrupt  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="differ"):
        link.sample(1)


def test_sizes_split_layers_from_ends() -> None:
    sizes = shapes.measure(
        [
            ("model.embed_tokens.weight", 1000),
            ("model.layers.0.a.weight", 300),
            ("model.layers.0.b.weight", 256),
            ("model.layers.1.a.weight", 100),
            ("lm_head.weight", 24),
        ]
    )
    assert (sizes.layers, sizes.layers_bytes, sizes.ends_bytes) == (2, 656, 1024)
    assert (sizes.layer_place_bytes, sizes.ends_place_bytes) == (512 + 256, 1024 + 256)
    assert sizes.model_bytes == 1680
    with pytest.raises(ValueError, match="layer"):
        shapes.measure([("head.weight", 8)])


def test_status_of_a_process() -> None:
    text = "Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t1024 kB\nRssAnon:\t 1000 kB\nThreads:\t3\n"
    wanted = {"VmHWM": 2048 << 10, "VmRSS": 1024 << 10, "RssAnon": 1000 << 10}
    assert rss.status_bytes(text) == wanted
    own = rss.status_bytes(Path("/proc/self/status").read_text())
    assert own["VmHWM"] >= own["VmRSS"] > 0
    assert rss.limit_bytes(10, 20, 30) == 60 + 200_000_000

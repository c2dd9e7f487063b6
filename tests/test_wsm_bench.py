"""`wsm bench`: what it moves in each run, and what it says of it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from wsm_ext.commands import bench, ceilings, cli
from wsm_ext.hf.synthetic import make_llama_checkpoint

MODEL = {"layers": 6, "hidden": 128, "intermediate": 352, "heads": 4, "kv_heads": 2, "vocab": 512}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama_checkpoint(tmp_path_factory.mktemp("bench") / "m", shards=2, **MODEL)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CELL_SECONDS", 0.02)


def run(folder: Path, out: Path, *words: str) -> dict[str, Any]:
    budgets = ["--device", "cpu", "--device-memory", "6MiB", "--host-memory", "2MiB"]
    work = ["--tokens", "8", "--passes", "2", *words]
    assert cli.main(["bench", str(folder), *budgets, *work, "--json", str(out), "--debug"]) == 0
    content = json.loads(out.read_text())
    assert content["hardware"]["cores"] >= 1
    assert content["versions"]["torch"] == torch.__version__
    return dict(content["bench"])


def test_each_run_moves_what_its_name_says(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(folder, tmp_path / "b.json")
    runs = {one["name"]: one for one in result["runs"]}
    assert list(runs) == ["your budgets", "from disk", "from RAM"]
    model = result["model_bytes"]
    # A run's passes are back to back: the next pass's prefetches count in this one.
    assert runs["from disk"]["disk_bytes"] == pytest.approx(model, rel=0.5)
    assert runs["from disk"]["h2d_bytes"] == pytest.approx(model, rel=0.5)
    assert runs["from RAM"]["disk_bytes"] == 0
    assert runs["from RAM"]["h2d_bytes"] == pytest.approx(model, rel=0.5)
    assert 0 < runs["your budgets"]["h2d_bytes"] < 1.5 * model
    assert result["compute_s_per_pass"] > 0
    for one in runs.values():
        assert one["limit"] in ("computing", "link", "disk")
        assert 0 < one["closeness"] <= 1
        assert one["least_s"][one["limit"]] == max(one["least_s"].values())
    printed = capsys.readouterr()
    for text in ("link to the device", "disk under the files", "from RAM", "how close"):
        assert text in printed.out
    assert "measuring the disk" in printed.err


def test_what_does_not_fit_in_ram_is_skipped_and_said(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "host_available", lambda: 1 << 20)
    result = run(folder, tmp_path / "b.json")
    assert [one["name"] for one in result["runs"]] == ["your budgets", "from disk"]
    assert "host memory are not free" in result["skipped"]["from RAM"]
    assert "from RAM: skipped" in capsys.readouterr().out


def test_the_limit_is_the_slowest_part() -> None:
    run = bench.Run("r", 2.0, h2d_bytes=100, disk_bytes=50, cached_share=0.0, streams=True)
    assert run.parts(link=100, disk=50, compute_s=0.5) == {"computing": 0.5, "link": 1, "disk": 1}
    found = bench._closeness(run, link=200, disk=25, compute_s=0.5)
    assert (found["limit"], found["closeness"]) == ("disk", 1.0)
    found = bench._closeness(run, link=1000, disk=1000, compute_s=1.0)
    assert (found["limit"], found["closeness"]) == ("computing", 0.5)
    # What the page cache had did not need the disk.
    warm = bench.Run("r", 2.0, h2d_bytes=0, disk_bytes=50, cached_share=0.5, streams=True)
    assert warm.parts(link=1, disk=50, compute_s=0)["disk"] == 0.5


@pytest.mark.parametrize("size", [1, 4096, 300_000])
def test_the_disk_is_measured_on_files_of_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    cell = ceilings.measure_disk([path])
    assert cell.bytes_per_s > 0


def test_a_file_that_refuses_direct_reads_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100_000)
    really_open = os.open

    def refuse(name: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return really_open(name, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    cell = ceilings.measure_disk([path])
    assert not cell.direct
    assert cell.bytes_per_s > 0


def test_the_link_is_measured() -> None:
    assert ceilings.measure_link(CPU) > 1e6

"""Host memory stays inside its budget, measured from outside as the kernel counts it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from waits import LIMIT_S

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import rss

import wsm_ext as wsm
from wsm_ext.hf.synthetic import make_llama_checkpoint

SHAPE = {"hidden": 512, "intermediate": 1408, "heads": 8, "kv_heads": 4, "vocab": 4000}
LAYERS = 68  # of 5.9 MB: 400 MB
SHARDS = 5


@pytest.mark.slow
def test_a_prefill_of_four_times_the_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_llama_checkpoint(tmp_path, layers=LAYERS, shards=SHARDS, **SHAPE)
    checkpoint = sum(image.nbytes for image in wsm.Checkpoint.open(tmp_path).tensors.values())
    assert checkpoint > 400 * rss.MB
    host_memory, device_memory = checkpoint // 4, 32 << 20
    monkeypatch.setattr(rss, "CHILD_LIMIT_S", LIMIT_S)
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))

    words = ["--folder", str(tmp_path), "--passes", "2", "--tokens", "16", "--units", "auto"]
    words += ["--host-memory", str(host_memory), "--device-memory", str(device_memory)]
    seen = rss.watch(words)

    # It did stream: a first pass brings all, a second one what neither memory keeps.
    assert seen["h2d_bytes"] > 1.5 * checkpoint
    assert seen["disk_bytes"] > 1.5 * checkpoint
    base = seen["after_imports"]["VmRSS"]
    assert base < seen["peak_bytes"] <= rss.limit_bytes(base, host_memory, device_memory)

"""from_pretrained reads the checkpoint while Python imports and builds: what arrives is used,
within the budget, and nothing depends on it."""

from __future__ import annotations

import gc
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from surroundings import NotHereError, drop
from transformers import AutoModelForCausalLM
from waits import wait_until

from wsm_ext import _engine, pretrained
from wsm_ext.checkpoints import checkpoint
from wsm_ext.checkpoints.checkpoint import Checkpoint
from wsm_ext.config import Config
from wsm_ext.hf import building
from wsm_ext.hf.synthetic import make_llama_checkpoint
from wsm_ext.planning.budgets import preload_room
from wsm_ext.pretrained import from_pretrained

MIB = 1 << 20
SPAN = 4 * MIB  # that is read at once
SHAPE = {"layers": 4, "hidden": 512, "intermediate": 1408, "heads": 8, "kv_heads": 4, "vocab": 512}
IDS = torch.arange(1, 11)[None]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """On a drive: the usual folder for temporary files may be a tmpfs."""
    place = Path(tempfile.mkdtemp(prefix="wsm-test-", dir=os.environ.get("TMPDIR") or "/var/tmp"))
    yield make_llama_checkpoint(place / "model", shards=2, dtype=torch.float32, **SHAPE)
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    """The resident model's logits. It maps the files, so it is gone before they are to be cold."""
    found = logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    gc.collect()
    return found


@pytest.fixture
def cold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small as it is, it is worth reading, and there is room until a plan says otherwise."""
    monkeypatch.setattr(pretrained, "_LEAST_PRELOAD_BYTES", 0)
    monkeypatch.setattr(pretrained, "preload_room", lambda *_: 1 << 30)
    try:
        for file in folder.glob("*.safetensors"):
            drop(file)
    except NotHereError as why:
        pytest.skip(str(why))
    return folder


def reads_directly(file: Path) -> bool:
    page = mmap.mmap(-1, _engine.direct_alignment(str(file)))
    try:
        opened = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        return os.preadv(opened, [page], 0) > 0
    except OSError:
        return False
    finally:
        os.close(opened)


@pytest.fixture
def started(cold: Path, monkeypatch: pytest.MonkeyPatch) -> list[_engine.Preload]:
    """The one that was begun; the model is built when all of the files has been read."""
    found: list[_engine.Preload] = []
    begin, prepare = pretrained._preload, building.prepare
    files = sorted(cold.glob("*.safetensors"))
    if not all(map(reads_directly, files)):
        pytest.skip("no direct reads here")
    spans_bytes = sum(-(-file.stat().st_size // SPAN) * SPAN for file in files)

    def begun(*given: Any) -> Any:
        preload = begin(*given)
        assert preload is not None
        found.append(preload)
        return preload

    def prepared(*given: Any, **named: Any) -> Any:
        wait_until(lambda: found[0].held_bytes == spans_bytes, "the reading of all files")
        return prepare(*given, **named)

    monkeypatch.setattr(pretrained, "_preload", begun)
    monkeypatch.setattr(building, "prepare", prepared)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "budgets",
    [
        {"device_memory": "200MiB", "host_memory": "200MiB"},  # all stays
        {"device_memory": "24MiB", "host_memory": "200MiB"},  # all is cached
        {"device_memory": "24MiB", "host_memory": "24MiB"},  # the cache takes the budget
        {"device_memory": "24MiB", "host_memory": "4MiB"},  # hardly a span
    ],
    ids=["stays", "cached", "full", "little"],
)
def test_bits_are_right_whatever_was_read(
    expected: torch.Tensor, cold: Path, started: list[_engine.Preload], budgets: dict[str, str]
) -> None:
    with from_pretrained(cold, device="cpu", **budgets) as model:
        memory = model.stats()["memory"]
        assert memory["host_bytes"] <= memory["host_peak_bytes"] <= memory["host_budget_bytes"]
        for _ in range(3):
            assert torch.equal(logits(model), expected)
        if model.plan.disk_home_bytes == 0:
            assert model.stats()["totals"]["disk_bytes"] == model.plan.model_bytes
    assert started[0].held_bytes == 0


@pytest.mark.parametrize(
    "wrong", [{"dtype": "float99"}, {"device_memory": "1KiB"}, {"auto_class": "NoSuchModel"}]
)
def test_a_failure_keeps_nothing_of_what_was_read(
    cold: Path, started: list[_engine.Preload], wrong: dict[str, str]
) -> None:
    with pytest.raises(ValueError) as failed:
        from_pretrained(cold, device="cpu", **wrong)
    assert started[0].held_bytes == 0
    assert failed.traceback  # which may be kept, and all that it refers to


def test_nothing_is_read_ahead_where_it_would_be_for_nothing(
    cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(**config: Any) -> Any:
        return pretrained._preload(shards, "cpu", "auto", Config.resolve(config))

    shards = Checkpoint.open(cold).shards

    assert isinstance(begun(), _engine.Preload)
    assert begun(direct=0) is None
    assert begun(cpu_cache_hwm_layers=3) is None  # a hard limit, which a plan must know
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "preload_room", lambda *_: 1 << 20)
        assert begun() is None
    monkeypatch.setattr(pretrained, "_LEAST_PRELOAD_BYTES", 1 << 30)
    assert begun() is None


def test_each_header_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_header = checkpoint.read_header

    def seen(file: Path, shard: int) -> Any:
        read.append(file.name)
        return read_header(file, shard)

    monkeypatch.setattr(checkpoint, "read_header", seen)
    with from_pretrained(folder, device="cpu", device_memory="24MiB", host_memory="24MiB"):
        assert sorted(read) == sorted(file.name for file in folder.glob("*.safetensors"))


class Watched(threading.Thread):
    """Remembers which threads were waited for."""

    joined: ClassVar[list[str]] = []

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        self.joined.append(self.name)


@pytest.mark.parametrize("failing", ["_open_weights", "_preload"])
def test_the_context_is_waited_for_whatever_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    opened: list[int] = []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_engine, "built_with_cuda", True)
    monkeypatch.setattr(_engine, "open_device", opened.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(threading, "Thread", Watched)
    monkeypatch.setattr(Watched, "joined", [])
    monkeypatch.setattr(pretrained, failing, interrupt)
    with pytest.raises(KeyboardInterrupt):
        from_pretrained(folder, device="cuda:3")
    assert (opened, Watched.joined) == ([3], ["wsm-context"])


def test_the_room_is_the_budget() -> None:
    assert preload_room(True, "259MiB") == 3 * MIB
    assert preload_room(True, "3MiB") == 0
    assert 0 < preload_room(True, "auto") < preload_room(False, "auto")
    assert preload_room(False, "1000TiB") <= preload_room(False, "auto") * 1.01
    with pytest.raises(ValueError, match="host_memory"):
        preload_room(False, "much")

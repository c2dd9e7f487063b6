import dataclasses
import io

import pytest
import torch
from rich.console import Console

from wsm_ext.commands import demo

CPU = torch.device("cpu")
TINY = demo.SIZES["tiny"]


@pytest.fixture
def out():
    return io.StringIO()


@pytest.fixture
def console(out):
    return Console(file=out, width=120)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(demo.tempfile, "tempdir", None)
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def test_it_streams_more_than_the_budgets_and_the_bits_are_equal(console, out, temporary):
    content = demo.run_demo(console, device=CPU, size=TINY)
    assert content["bit_equal"]
    assert content["different"] == []
    plan = content["plan"]
    assert content["checkpoint_bytes"] > plan["device_budget_bytes"] + plan["host_budget_bytes"]
    assert all(entry["disk_bytes"] > 0 for entry in content["prefill"]["passes"])
    assert "bit-equal" in out.getvalue()
    assert list(temporary.glob("wsm-demo-*")) == []


def test_the_first_token_of_one_sequence_has_the_bits_of_a_frozen_model(console):
    # A slice of the prefill, which torch multiplies in another way where a weight requires grad.
    shape = {"hidden": 512, "intermediate": 128, "heads": 4, "kv_heads": 1, "vocab": 16000}
    size = demo.Size(
        shape,
        layers=2,
        shards=1,
        tokens=64,
        device_memory="24MiB",
        host_memory="4MiB",
        new_tokens=2,
    )
    assert demo.run_demo(console, device=CPU, size=size)["bit_equal"]


def test_different_bits_are_found_and_named(console, out, monkeypatch):
    honest = demo._resident

    def off_by_one_bit(*arguments):
        outcome = honest(*arguments)
        outcome.step_logits.view(torch.int16)[-1, -1, -1] ^= 1
        return outcome

    monkeypatch.setattr(demo, "_resident", off_by_one_bit)
    content = demo.run_demo(console, device=CPU, size=TINY)
    assert not content["bit_equal"]
    assert content["different"] == ["logits of the generation"]
    assert "different bits" in out.getvalue()


def test_a_checkpoint_is_kept_where_asked(console, tmp_path):
    kept = tmp_path / "kept"
    demo.run_demo(console, device=CPU, size=TINY, keep=kept)
    assert len(list(kept.glob("*.safetensors"))) == TINY.shards
    with pytest.raises(ValueError, match="kept is not empty"):
        demo.run_demo(console, device=CPU, size=TINY, keep=kept)


def test_nothing_is_left_behind_by_a_failure(console, temporary):
    with pytest.raises(ValueError, match="host_memory"):
        demo.run_demo(console, device=CPU, size=dataclasses.replace(TINY, host_memory="much"))
    assert list(temporary.glob("wsm-demo-*")) == []


def test_bits_are_compared_not_values():
    nan = torch.tensor([float("nan"), 0.0])
    assert demo._same_bits(nan, nan.clone())
    assert not demo._same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not demo._same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert not demo._same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))

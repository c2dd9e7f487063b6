"""The sweep tells what is equal, what differs and what dies, each from the others."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import sweep
import sweep_models
import torch


def test_a_type_is_compared_in_a_worker() -> None:
    results = sweep.sweep(["llama", "t5"], "cpu", jobs=1, limit_s=250)
    assert [record["outcome"] for record in results.values()] == [sweep.EQUAL] * 2
    assert all(record["generates"] for record in results.values())


@pytest.mark.parametrize("part", ["forward", "generate"])
def test_a_wrong_bit_is_found(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    name, owner = ("run", sweep_models) if part == "forward" else ("_generate", sweep)
    right = getattr(owner, name)

    def wrong(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = right(model, *args, **kwargs)
        if hasattr(model, "plan"):  # it streams
            calls.append(model)
            (result[0] if isinstance(result, list) else result)[..., -1] += 1
        return result

    monkeypatch.setattr(owner, name, wrong)
    record = sweep.check("llama", "cpu")
    assert record["outcome"] == sweep.DIFFERENT
    assert f"layer: {part}" in record["detail"]
    assert calls


def test_a_worker_that_dies_costs_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = sweep.Worker("cpu", limit_s=250)
    assert worker.check("florence_vision")["outcome"] == sweep.NOT_BUILT
    assert worker._process is not None
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    assert worker.check("llama")["outcome"] == sweep.CRASHED
    assert worker.check("florence_vision")["outcome"] == sweep.NOT_BUILT
    worker.close()


def test_inputs_are_the_forward_s_own() -> None:
    class Writes(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            input_ids[:, 0] = 1
            return input_ids

    inputs = {"input_ids": torch.full((1, 4), 7)}
    sweep_models.run(Writes(), inputs)
    assert inputs["input_ids"].tolist() == [[7, 7, 7, 7]]

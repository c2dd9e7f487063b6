"""What a request stands for: the device that a name means."""

import pytest
import torch

from wsm_ext import EngineError, _engine
from wsm_ext.runtime.request import resolve_device

CPU = torch.device("cpu")


def test_devices_that_cannot_serve_are_refused():
    assert resolve_device("cpu") == resolve_device(CPU) == CPU
    for name in ("gpu7", "mps"):
        with pytest.raises(ValueError, match=f"device '{name}' is not"):
            resolve_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(_engine, "built_with_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(None) == CPU
    with pytest.raises(EngineError, match="torch sees no CUDA device"):
        resolve_device("cuda:1")
    monkeypatch.setattr(_engine, "built_with_cuda", False)
    with pytest.raises(EngineError, match="built without CUDA"):
        resolve_device("cuda:1")

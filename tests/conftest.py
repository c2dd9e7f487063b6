"""Fixtures that all tests share. `device`: the host device, and a GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch

KEPT = ("WSM_REQUIRE_GPU", "WSM_TEST_SEED", "WSM_TEST_CYCLES")
GPU_REQUIRED = os.environ.get("WSM_REQUIRE_GPU") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") and not GPU_REQUIRED:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("WSM_REQUIRE_GPU=1, and torch sees no CUDA GPU")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _settings_unset(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No setting of the caller's environment reaches a test, nor what was measured before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for name in list(os.environ):
        if name.startswith("WSM_") and name not in KEPT:
            monkeypatch.delenv(name)

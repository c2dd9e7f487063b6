"""What the seam in C++ (csrc/bindings/seam.h) uses of torch, and what is said where a pass ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _engine


def make_seam(
    engine: _engine.Engine | None,
    device: torch.device,
    turn_limit_s: float,
    check_frozen: Callable[[], None],
) -> _engine.Seam:
    """`engine` None: every unit is always there."""
    calls = _engine.TorchCalls()
    calls.set_version = torch._C._autograd._unsafe_set_version_counter
    calls.versions_in_lists = _versions_in_lists()
    calls.current_task = torch._C._current_graph_task_id
    calls.is_grad_enabled = torch.is_grad_enabled
    calls.equal = torch.equal
    calls.functorch_level = torch._C._functorch.maybe_current_level
    calls.queue_callback = torch.autograd.Variable._execution_engine.queue_callback
    calls.raw_stream = None
    if device.type == "cuda":
        calls.raw_stream = torch._C._cuda_getCurrentRawStream  # makes no Stream object
        calls.device_index = _index(device)
    return _engine.Seam(engine, calls, turn_limit_s, check_frozen)


def stream_getter(device: torch.device) -> Callable[[], int]:
    """The compute stream of the calling thread as an integer; 0 on the host device."""
    if device.type != "cuda":
        return lambda: 0
    index = _index(device)
    raw: Callable[[int], int] = torch._C._cuda_getCurrentRawStream
    return lambda: raw(index)


def current_task() -> int:
    """The backward (autograd's graph task) that this thread works for; -1 outside of all."""
    return torch._C._current_graph_task_id()


def out_of_memory(error: torch.OutOfMemoryError) -> torch.OutOfMemoryError:
    """The error of a forward, with what can be done about it."""
    return torch.OutOfMemoryError(
        f"{error}\nThe streamed weights keep what they were given: shrink('1GiB') of the streamed"
        " module gives device memory back, and workload=(batch, tokens) makes stream() leave room"
        " for a forward of that size"
    )


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _versions_in_lists() -> bool:
    """Torch 2.6 and newer set the versions of several tensors at once."""
    setter: Any = torch._C._autograd._unsafe_set_version_counter
    try:
        with torch.inference_mode(False):  # only such tensors have a version
            setter((torch.empty(0, device="cpu"),), (0,))
    except TypeError:
        return False
    return True

"""How much device memory a forward needs beside the weights, found by a trial.

The forward runs with zeros for weights: nothing is read, nothing is waited for, and what it
allocates is what the real one will.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..planning.device_memory import DeviceMemory
from ..planning.planner import ModulePlan
from ..planning.workload import WorkloadSize
from .parameter_swapper import ParameterSwapper

# (sequences, tokens of each), or a function that runs the module as it will be run.
Workload = tuple[int, int] | Callable[[nn.Module], Any]

# Beyond what was in use at once: the allocator cannot fill every hole.
_FRAGMENTATION = 1.05
_WAIT_S = 60.0


def activation_bytes(
    module: nn.Module, planned: ModulePlan, device: torch.device, workload: Workload
) -> int:
    """Peak bytes that one forward of the workload allocates on the device, its outputs and the KV
    cache among them; or a step after it, if that takes more.

    The module's buffers must be on the device. Raises ValueError where the workload does not fit
    the module, torch.OutOfMemoryError where it does not fit the device.
    """
    run = _runner(module, device, workload)
    memory = DeviceMemory(torch.zeros(planned.plan.arena_bytes, dtype=torch.uint8, device=device))
    swapper = ParameterSwapper(
        module,
        planned.units,
        planned.source,
        planned.plan,
        None,  # every unit is always there
        device,
        memory,
        _WAIT_S,
    )
    try:
        with torch.inference_mode():
            peak = _cuda_peak(run, device) if device.type == "cuda" else _tracked_peak(run)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"workload: the trial forward failed: {error}") from error
    finally:
        swapper.undo()
    return int(peak * _FRAGMENTATION)


def _runner(module: nn.Module, device: torch.device, workload: Workload) -> Callable[[], Any]:
    if callable(workload):
        return lambda: workload(module)
    batch, tokens = WorkloadSize.of(workload)
    parameters = inspect.signature(module.forward).parameters
    if "input_ids" not in parameters:
        raise ValueError(
            f"workload=({batch}, {tokens}): {type(module).__name__} takes no input_ids; give a"
            " function that runs the module: workload=lambda module: module(...)"
        )
    ids = torch.zeros((batch, tokens), dtype=torch.long, device=device)
    arguments: dict[str, Any] = {"input_ids": ids}
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        arguments["decoder_input_ids"] = ids
    if getattr(config, "use_cache", False):
        arguments["use_cache"] = True
    if "logits_to_keep" in parameters:  # as generate() does
        arguments["logits_to_keep"] = 1

    def run() -> None:
        outputs = module(**arguments)
        cache = getattr(outputs, "past_key_values", None)
        del outputs
        if cache is not None:
            _decode_otherwise(module, {"input_ids": ids[:, :1], "past_key_values": cache})

    return run


def _decode_otherwise(module: nn.Module, step: dict[str, Any]) -> None:
    """One step of `generate()`, if that runs experts in another way than the forward does: on a
    GPU transformers switches to one that gathers the weights of all chosen experts."""
    switch = getattr(module, "_optimize_model_for_decode", None)
    if switch is None:
        return
    ways: Callable[[], Any] = module.get_experts_implementation  # type: ignore[assignment]
    before = ways()
    with switch():
        if ways() != before:
            module(**step, use_cache=True)


def _cuda_peak(run: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = int(torch.cuda.memory_allocated(device))
    result = run()
    torch.cuda.synchronize(device)
    peak = int(torch.cuda.max_memory_allocated(device)) - before
    del result
    torch.cuda.empty_cache()
    return peak


def _tracked_peak(run: Callable[[], Any]) -> int:
    with _Tracker() as tracker:
        result = run()
    del result
    return int(tracker.peak)


class _Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._key(tensor) not in inputs:
                self._add(tensor.untyped_storage())
        return result

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        nbytes = storage.nbytes()
        self._seen.add(key)
        self._live += nbytes
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._remove, key, nbytes)

    def _remove(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self._live -= nbytes

"""Memory whose address the engine is given.

A caller may have set a default device, or be inside a mode of torch that makes tensors without
bytes (fake tensors). What is allocated here lies where it says all the same, and an address is
given only of bytes that are there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

_PLAIN = (torch.Tensor, nn.Parameter)


@contextmanager
def without_modes() -> Iterator[None]:
    """Tensors are made and copied as in a fresh interpreter: no mode of the caller takes part."""
    if sys.is_finalizing():  # what is closed then is in no mode, and nothing can be imported
        yield
        return
    with torch.inference_mode(False), _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def empty_in_ram(shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="cpu")


def address_of(tensor: torch.Tensor, nbytes: int, device: str = "cpu") -> int:
    """Where the `nbytes` bytes of a contiguous tensor lie; 0 if it has none.

    Raises RuntimeError if they are not there: on another device, on meta, or fewer.
    """
    real = type(tensor) in _PLAIN and tensor.layout == torch.strided
    if not (real and tensor.device.type == device and tensor.is_contiguous()):
        raise RuntimeError(
            f"memory on {device!r} was asked for and {_described(tensor)} was given: call wsm_ext"
            " outside of fake tensor modes and the like"
        )
    if tensor.nbytes != nbytes:
        raise RuntimeError(f"{nbytes} bytes were asked for and {tensor.nbytes} were given")
    return tensor.data_ptr() if nbytes else 0


def _described(tensor: torch.Tensor) -> str:
    return f"a {type(tensor).__name__} on {tensor.device} ({tensor.layout})"

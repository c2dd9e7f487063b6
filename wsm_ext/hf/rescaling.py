"""RWKV divides some of its own weights before the first forward in eval mode, in place.

Streamed weights are not written to: they are divided when they arrive, and the model is told that
it is done. The divisors are powers of two, so each bit is that of the resident model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..checkpoints.arrival import Arrival, ArrivingTensor
from ..checkpoints.image import TensorImage

_RESCALED = ("attention.output.weight", "feed_forward.value.weight")


def rescale_on_arrival(model: PreTrainedModel, images: dict[str, TensorImage]) -> None:
    for path, inner in model.named_modules():
        if not hasattr(inner, "_rescale_layers") or not hasattr(inner, "layers_are_rescaled"):
            continue
        every = inner.config.rescale_every
        for index in range(len(inner.blocks) if every > 0 else 0):
            divisor = 2 ** (index // every)
            for key in _RESCALED:
                name = f"{path}.blocks.{index}.{key}" if path else f"blocks.{index}.{key}"
                if divisor > 1:
                    images[name] = _divided(images[name], divisor)
        inner.layers_are_rescaled = True


def _divided(image: TensorImage, divisor: int) -> TensorImage:
    before = image.arrival or Arrival((ArrivingTensor(0, image.dtype, image.shape),))
    return replace(image, arrival=Arrival(before.tensors, _divide_after(before.convert, divisor)))


def _divide_after(
    convert: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None, divisor: int
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    def divide(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return (tensors[0] if convert is None else convert(tensors)).div(divisor)

    return divide

"""A transformers model of two layers with made-up weights, from which computing is measured."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..sizes import format_bytes
from .building import build_model

SMALL_VOCABULARY = 1024


class TwoLayersError(Exception):
    """The model cannot be cut to two layers; the message says why."""


def build_two_layers(module: nn.Module, device: torch.device, room_bytes: int) -> nn.Module:
    """A model of the shape of `module` with two layers, on the device; with a small vocabulary if
    it would not fit into `room_bytes`."""
    if not isinstance(module, PreTrainedModel):
        raise TwoLayersError("it is not a transformers model")
    for vocabulary in (None, SMALL_VOCABULARY):
        config = _cut(module.config, vocabulary)
        model = build_model(config, type(module), module.dtype)
        needed = sum(p.numel() * p.element_size() for p in model.parameters())
        if needed <= room_bytes:
            return _fill(model, device)
    raise TwoLayersError(f"two of its layers need {format_bytes(needed)}, more than there is room")


def _cut(config: Any, vocabulary: int | None) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers < 2:
        raise TwoLayersError("its config has no num_hidden_layers to cut")
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:  # one entry for each layer
            setattr(text, key, value[:2])
    text.num_hidden_layers = 2
    if vocabulary is not None:
        text.vocab_size = min(text.vocab_size, vocabulary)
        text.pad_token_id = None  # may lie outside
    return config


def _fill(model: nn.Module, device: torch.device) -> nn.Module:
    """Made-up weights: random on a GPU, where bits that change cost power and clock; on the CPU one
    value, which is quicker to write."""
    filled: dict[int, nn.Parameter] = {}  # by the parameter that it stands for: tied ones stay tied
    for owner in model.modules():
        for key, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in filled:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if device.type == "cuda" and values.is_floating_point():
                    values.uniform_(-0.02, 0.02)
                else:
                    values.fill_(0.01)
                filled[id(parameter)] = nn.Parameter(values, requires_grad=False)
            owner._parameters[key] = filled[id(parameter)]
        for key, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[key] = buffer.to(device)
    return model.eval()

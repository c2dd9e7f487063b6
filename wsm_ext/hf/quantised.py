"""Quantised models, which are not supported yet: how one is known, and what to do with it.

transformers is imported to give advice only: `stream()` asks here too, and does not need it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.image import CheckpointError

_ENTRIES = ("quantization_config", "compression_config")
# Of compressed-tensors, on each module that it has changed.
_MARKS = ("quantization_scheme", "quantization_status")
# What stands beside a weight, and says what its bytes mean.
_COMPANION = re.compile(
    r"(q?zeros?|zero_points?|\w*scales?(_inv|_2)?|g_idx|absmax|quant_\w+|nested_\w+|SCB|qweight"
    r"|weight_(packed|shape|blocks|g_idx))$"
)


def refuse_quantised_folder(folder: Path) -> None:
    """Raises CheckpointError naming the method, wherever config.json has it."""
    try:
        content = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # whoever reads the config says what is wrong
    method = next(_methods_in(content), None)
    if method is not None:
        raise CheckpointError(f"{folder} {_refusal(method)}")


def refuse_quantised_module(module: nn.Module) -> None:
    """Raises ValueError naming the module in it that is quantised."""
    for name, inner in module.named_modules():
        method = _method_of(inner)
        if method is not None:
            what = f"module {name!r}" if name else f"the module ({type(inner).__name__})"
            raise ValueError(f"{what} {_refusal(method)}")


def quantised_companions(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the names that would stand beside a weight of the model: what is read of the weight
    means something else without them."""
    weighted = {
        name for name, m in model.named_modules() if m._parameters.get("weight") is not None
    }
    split = [(name, *name.rpartition(".")[::2]) for name in names]
    return [name for name, path, key in split if path in weighted and _COMPANION.match(key)]


def _method_of(module: nn.Module) -> str | None:
    attributes = vars(module)
    quantizer = attributes.get("hf_quantizer")
    if quantizer is not None:
        config = getattr(quantizer, "quantization_config", None)
        return _text(getattr(config, "quant_method", type(quantizer).__name__))
    if any(mark in attributes for mark in _MARKS):
        return "compressed-tensors"
    if attributes.get("is_quantized"):
        return _text(attributes.get("quantization_method", "by is_quantized"))
    if "is_quantized" in attributes:  # it was, and transformers has undone it
        return None
    return next(_methods_in(attributes.get("config")), None)


def _methods_in(config: object) -> Iterator[str]:
    """The methods that a config names, at any depth."""
    waiting, seen = [config], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (list, tuple)):
            waiting += value
            continue
        if not isinstance(value, Mapping):
            if not hasattr(value, "to_dict"):
                continue
            value = vars(value)
        for entry in _ENTRIES:
            if value.get(entry) is not None:
                yield _text(_entry(value[entry], "quant_method"))
        waiting += value.values()


def _entry(found: object, key: str) -> object:
    return found.get(key) if isinstance(found, Mapping) else getattr(found, key, None)


def _text(method: object) -> str:
    return str(getattr(method, "value", method))


def _refusal(method: str) -> str:
    return (
        f"is quantised ({method}), and quantised models are not supported yet: take the model's"
        f" unquantised checkpoint{_advice(method)}"
    )


def _advice(method: str) -> str:
    """How transformers makes an unquantised checkpoint of it, if it can."""
    try:
        from transformers.quantizers import auto, base

        configs: Mapping[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        quantizers: Mapping[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    except ImportError:
        return ""
    config = configs.get(method)
    if config is not None and "dequantize" in inspect.signature(config.__init__).parameters:
        return (
            f", or load this one with quantization_config={config.__name__}(dequantize=True) in"
            " transformers' from_pretrained, and save_pretrained(folder,"
            " save_original_format=False)"
        )
    quantizer = quantizers.get(method) or quantizers.get(f"{method}_4bit")
    if quantizer is not None and quantizer._dequantize is not base.HfQuantizer._dequantize:
        return (
            ", or load this one with transformers, call dequantize(), and save_pretrained(folder)"
        )
    return ""

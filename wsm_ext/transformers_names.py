"""Which tensor of a checkpoint belongs to which parameter, by transformers' own rules.

The order is that of `PreTrainedModel.from_pretrained`: rename, tie, then judge what is missing and
surplus, dtypes and shapes. Whatever transformers would do with the tensors' bytes (casts, fused
experts, transposes) is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from .checkpoint import Checkpoint, CheckpointError, TensorImage

_log = logging.getLogger("wsm_ext")

_NAMES_SHOWN = 10


def place(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    main_dtype: torch.dtype,
    asked: str | torch.dtype,
) -> dict[str, TensorImage]:
    """An image for every parameter of the model, under all of its names, and for its buffers.

    Ties the model's parameters, and gives them the dtypes that transformers would.
    """
    images, surplus = _match_names(model, checkpoint)
    _tie(model, images)
    _check_names(model, images, surplus)
    _settle_dtypes(model, images, main_dtype, asked)
    _check_shapes(model, images)
    return images


def meta_parameter(like: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without bytes that transformers takes for an initialised one."""
    floating = dtype.is_floating_point or dtype.is_complex
    twin = nn.Parameter(
        torch.empty_like(like, device="meta", dtype=dtype),
        requires_grad=like.requires_grad and floating,
    )
    twin._is_hf_initialized = True  # type: ignore[attr-defined]
    return twin


def _match_names(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[dict[str, TensorImage], set[str]]:
    """Images under the model's names, and the tensors that the model has no place for."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    places = model.state_dict()
    prefix = model.base_model_prefix
    images: dict[str, TensorImage] = {}
    surplus: set[str] = set()
    converted: list[str] = []
    # Some renamings keep state and rely on this order.
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, places)
        if name not in places and key in places:
            name, pattern = rename_source_key(
                key, [], [], base_model_prefix=prefix, meta_state_dict=places
            )
        if name not in places:
            surplus.add(name if pattern is None else key)
        elif pattern is not None:
            converted.append(f"{key} -> {name} ({_operations(converters, pattern)})")
        elif name in images:
            _log.warning("%s and %s are both %s; the first is used", images[name].name, key, name)
        else:
            images[name] = checkpoint.tensors[key]
    if converted:
        raise CheckpointError(
            f"{type(model).__name__}: transformers converts these tensors while it loads them, "
            f"which is not supported yet: {_some(converted)}"
        )
    return images, surplus


def _operations(converters: Iterable[WeightConverter], pattern: str) -> str:
    rule = next(rule for rule in converters if pattern in rule.source_patterns)
    return ", ".join(map(repr, rule.operations))


def _tie(model: PreTrainedModel, images: dict[str, TensorImage]) -> None:
    """Tied names share one parameter, and the image of whichever of them the checkpoint has.

    Where it has several, each keeps its own: `stream` makes them one if their bytes are equal, and
    leaves them apart if not, as `PreTrainedModel.tie_weights` does.
    """
    for target, source in model.all_tied_weights_keys.items():
        parent, _, key = target.rpartition(".")
        setattr(model.get_submodule(parent), key, model.get_parameter(source))
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    for names in names_of.values():
        first = next((images[name] for name in names if name in images), None)
        if first is not None:
            images.update({name: first for name in names if name not in images})


def _check_names(
    model: PreTrainedModel, images: Mapping[str, TensorImage], surplus: set[str]
) -> None:
    places = {name for name in model.state_dict() if not name.endswith("_extra_state")}
    keys = SimpleNamespace(missing_keys=places - images.keys(), unexpected_keys=surplus)
    model._adjust_missing_and_unexpected_keys(keys)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # A parameter has no value of its own, so it is needed even where transformers would do without.
    missing = parameters - images.keys()
    lost = sorted(keys.missing_keys - parameters)
    if lost:
        _log.warning("not in the checkpoint, buffers keep their initial values: %s", _some(lost))
    problems = []
    if missing:
        problems.append(f"parameters that the checkpoint lacks: {_some(missing)}")
    if keys.unexpected_keys:
        problems.append(f"tensors that the model has no place for: {_some(keys.unexpected_keys)}")
    if problems:
        raise CheckpointError(f"{type(model).__name__}: " + "; ".join(problems))


def _settle_dtypes(
    model: PreTrainedModel,
    images: Mapping[str, TensorImage],
    main_dtype: torch.dtype,
    asked: str | torch.dtype,
) -> None:
    """Give each parameter the dtype that transformers would load it with; the file must have it."""
    plan = model._get_dtype_plan(main_dtype)
    pattern, key_of, _ = build_glob_alternation(list(plan))
    wrong = []
    for name, parameter in list(model.named_parameters()):
        match = pattern.search(name) if plan else None
        wanted = plan[key_of[str(match.lastgroup)]] if match else parameter.dtype
        if images[name].dtype != wanted:
            wrong.append(f"{name} (file {_short(images[name].dtype)}, wanted {_short(wanted)})")
        elif parameter.dtype != wanted:
            _replace_parameter(model, parameter, meta_parameter(parameter, wanted))
    if wrong:
        source = "config.json" if asked == "auto" else "the dtype argument"
        raise ValueError(
            f"{source} asks for {_short(main_dtype)}, and casting while loading is not supported "
            f"yet: pass the checkpoint's own dtype. Tensors that differ: {_some(wrong)}"
        )


def _replace_parameter(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = new


def _check_shapes(model: PreTrainedModel, images: Mapping[str, TensorImage]) -> None:
    places = model.state_dict()
    wrong = [
        f"{name} (file {list(image.shape)}, model {list(places[name].shape)})"
        for name, image in images.items()
        if tuple(image.shape) != tuple(places[name].shape)
    ]
    if wrong:
        raise CheckpointError(f"{type(model).__name__}: wrong shapes: {_some(wrong)}")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names, key=dot_natural_key)
    more = len(ordered) - _NAMES_SHOWN
    return ", ".join(ordered[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

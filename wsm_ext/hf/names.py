"""Which tensor of a checkpoint belongs to which parameter, by transformers' own rules.

The order is that of `PreTrainedModel.from_pretrained`: rename, convert, tie, then judge what is
missing and surplus, shapes and dtypes. Conversions (fused experts, transposes) are transformers'
own operations, run by `conversions`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

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

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.image import CheckpointError, TensorImage
from ..wording import first_of
from .conversions import cast, convert
from .parts import under_names_of_part
from .quantised import quantised_companions
from .rescaling import rescale_on_arrival

_log = logging.getLogger("wsm_ext")

_MOST_NAMED = 10


def place(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    main_dtype: torch.dtype,
) -> tuple[dict[str, TensorImage], dict[str, torch.Tensor]]:
    """An image for every parameter of the model, under all of its names, and for its buffers; the
    values of those that the checkpoint need not have, since transformers computes them.

    Ties the model's parameters, and gives them the dtypes that transformers would.
    """
    images, conversions, surplus = _match_names(model, checkpoint)
    if not images and not conversions:
        checkpoint = under_names_of_part(model, checkpoint)
        images, conversions, surplus = _match_names(model, checkpoint)
    first_of = _convert(model, checkpoint, conversions, images)
    _tie(model, images)
    computed = _check_names(model, images, surplus)
    _check_shapes(model, images)
    _settle_dtypes(model, images, main_dtype, first_of)
    rescale_on_arrival(model, images)
    absent = {name: t for name, t in _buffers_saved(model).items() if name not in images}
    return images, _compute(model, computed) | absent


def _buffers_saved(model: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers, by all of their names."""
    return {
        f"{path}.{key}" if path else key: buffer
        for path, owner in model.named_modules(remove_duplicate=False)
        for key, buffer in owner._buffers.items()
        if buffer is not None and key not in owner._non_persistent_buffers_set
    }


def meta_parameter(like: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A parameter without bytes that transformers takes for an initialised one."""
    floating = dtype.is_floating_point or dtype.is_complex
    twin = nn.Parameter(
        torch.empty_like(like, device="meta", dtype=dtype),
        requires_grad=like.requires_grad and floating,
    )
    twin._is_hf_initialized = True  # type: ignore[attr-defined]
    return twin


@dataclass
class _Conversion:
    """A rule of transformers, and the checkpoint's tensors that it takes together."""

    rule: WeightConverter
    patterns: list[str] = field(default_factory=list)  # which of the rule's each key matches
    keys: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{', '.join(map(repr, self.rule.operations))} of {_listed(self.keys)}"

    def run(
        self, model: PreTrainedModel, name: str, tensors: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What the rule makes of the tensors, which are those of `keys`; `name` is the first."""
        rule = copy(self.rule)
        rule.collected_tensors = {pattern: [] for pattern in self.patterns}
        for pattern, tensor in zip(self.patterns, tensors, strict=True):
            rule.collected_tensors[pattern].append(tensor)
        outputs: Any = rule.convert(name, model=model, config=model.config)
        if isinstance(outputs, tuple):  # transformers 5.0: with the errors
            outputs = outputs[0]
        return {key: t[0] if isinstance(t, list) else t for key, t in outputs.items()}


def _match_names(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[dict[str, TensorImage], dict[str, _Conversion], set[str]]:
    """Images under the model's names, conversions by the first name that they make, and the tensors
    that the model has no place for."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    places = model.state_dict()
    prefix = model.base_model_prefix
    images: dict[str, TensorImage] = {}
    conversions: dict[str, _Conversion] = {}
    surplus: set[str] = set()
    # Some renamings keep state and rely on this order; so do lists of experts.
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, places)
        if name not in places and key in places:
            name, pattern = rename_source_key(key, [], [], prefix, places)
        if name not in places:
            surplus.add(name if pattern is None else key)
        elif pattern is not None:
            conversion = conversions.setdefault(name, _Conversion(rule_of[pattern]))
            conversion.patterns.append(pattern)
            conversion.keys.append(key)
        elif name in images:
            _log.warning("%s and %s are both %s; the first is used", images[name].name, key, name)
        else:
            images[name] = checkpoint.tensors[key]
    return images, conversions, surplus


def _convert(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    conversions: Mapping[str, _Conversion],
    images: dict[str, TensorImage],
) -> dict[str, str]:
    """Add the images of what the conversions make. By name: the first name of its conversion."""
    places = model.state_dict()
    first_of: dict[str, str] = {}
    for first, conversion in conversions.items():

        def run(
            tensors: Sequence[torch.Tensor],
            conversion: _Conversion = conversion,
            first: str = first,
        ) -> dict[str, torch.Tensor]:
            return conversion.run(model, first, tensors)

        try:
            converted = convert(run, [checkpoint.tensors[key] for key in conversion.keys])
        except Exception as error:  # whatever an operation of transformers may raise
            raise CheckpointError(
                f"{type(model).__name__}: {first} cannot be made by transformers' {conversion}:"
                f" {error}"
            ) from error
        for name, image in converted.items():
            if name not in places or name in images:
                what = "has no place for it" if name not in places else "has it from elsewhere"
                raise CheckpointError(
                    f"{type(model).__name__}: transformers' {conversion} makes {name}, but the"
                    f" model {what}"
                )
            images[name] = image
            first_of[name] = first
    return first_of


def _tie(model: PreTrainedModel, images: dict[str, TensorImage]) -> None:
    """Tied names share one parameter, and the image of whichever of them the checkpoint has.

    If it has several, each keeps its own: `stream` makes them one if their bytes are equal, and
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
) -> list[str]:
    """Raise for names that should not be missing. Returns parameters that may be. Surplus names are
    told, as in transformers: who loads a part of a model has them."""
    places = {name for name in model.state_dict() if not name.endswith("_extra_state")}
    keys = SimpleNamespace(missing_keys=places - images.keys(), unexpected_keys=surplus)
    model._adjust_missing_and_unexpected_keys(keys)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = parameters & keys.missing_keys
    lost = sorted(keys.missing_keys - parameters)
    if lost:
        _log.warning("not in the checkpoint, buffers keep their initial values: %s", _listed(lost))
    surplus = keys.unexpected_keys
    what = f"tensors that the model has no place for: {_listed(surplus)}"
    if missing:
        lacks = f"parameters that the checkpoint lacks: {_listed(missing)}"
        raise CheckpointError(f"{type(model).__name__}: {lacks}{'; ' + what if surplus else ''}")
    companions = quantised_companions(model, surplus)
    if companions:
        raise CheckpointError(
            f"{type(model).__name__}: the checkpoint is quantised, though config.json does not say"
            f" so: it has {_listed(companions)}. Take the model's unquantised checkpoint"
        )
    if surplus:
        _log.warning("%s: %s", type(model).__name__, what)
    return sorted(parameters - images.keys())


def _compute(model: PreTrainedModel, names: list[str]) -> dict[str, torch.Tensor]:
    """What transformers makes of parameters that its checkpoints need not have (positions as
    sines)."""
    values: dict[str, torch.Tensor] = {}
    for name in names:
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        absent = owner._parameters[key]
        value = nn.Parameter(torch.zeros_like(absent, device="cpu"), requires_grad=False)
        owner._parameters[key] = value
        try:
            with torch.device("cpu"):
                model._init_weights(owner)
        finally:
            owner._parameters[key] = absent
        values[name] = value.detach().contiguous()
    if names:
        _log.warning("not in the checkpoint, computed by transformers: %s", _listed(names))
    return values


def _settle_dtypes(
    model: PreTrainedModel,
    images: dict[str, TensorImage],
    main_dtype: torch.dtype,
    first_of: Mapping[str, str],
) -> None:
    """Give each image and its parameter the dtype that transformers would load it with."""
    plan = model._get_dtype_plan(main_dtype)
    pattern, key_of, _ = build_glob_alternation(list(plan))
    places = model.state_dict()

    def wanted(name: str) -> torch.dtype:
        name = first_of.get(name, name)  # what one conversion makes has one dtype
        match = pattern.search(name) if plan else None
        dtype: torch.dtype = plan[key_of[str(match.lastgroup)]] if match else places[name].dtype
        return dtype

    settled: dict[int, TensorImage] = {}  # tied names share an image: that of the first
    lost: list[str] = []
    for name, image in images.items():
        if id(image) not in settled:
            dtype = wanted(name)
            if not _keeps_its_sense(image.dtype, dtype):
                lost.append(f"{name} (file {image.dtype}, model {dtype})")
            settled[id(image)] = cast(image, dtype)
    if lost:
        raise CheckpointError(
            f"{type(model).__name__}: a cast would make other values of {_listed(lost)}. Is the"
            " checkpoint quantised, or another model's?"
        )
    images.update({name: settled[id(image)] for name, image in images.items()})
    for name, parameter in list(model.named_parameters()):
        if name in images and images[name].dtype != parameter.dtype:
            _replace_parameter(model, parameter, meta_parameter(parameter, images[name].dtype))
    _settle_buffers(model, images)


def _settle_buffers(model: nn.Module, images: dict[str, TensorImage]) -> None:
    """Buffers have the dtype of what is loaded into them, as transformers leaves them. One that
    several modules share stays one."""
    settled: dict[int, torch.Tensor] = {}
    for path, owner in model.named_modules():
        for key, buffer in owner._buffers.items():
            image = images.get(f"{path}.{key}" if path else key)
            if buffer is not None and image is not None and image.dtype != buffer.dtype:
                settled.setdefault(id(buffer), buffer.to(image.dtype))
        owner._buffers.update(
            (key, settled[id(buffer)])
            for key, buffer in owner._buffers.items()
            if id(buffer) in settled
        )


def _keeps_its_sense(file: torch.dtype, model: torch.dtype) -> bool:
    """Whether a cast keeps values, but for their precision. Whole numbers that are to be fractions
    were made so by a scale."""
    if file == model:
        return True
    if file.is_complex or model.is_complex:
        return file.is_complex == model.is_complex
    if file.is_floating_point or model.is_floating_point:
        return file.is_floating_point and model.is_floating_point
    if torch.bool in (file, model):
        return file == torch.bool
    narrow, wide = torch.iinfo(file), torch.iinfo(model)
    return wide.min <= narrow.min and narrow.max <= wide.max


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
        raise CheckpointError(f"{type(model).__name__}: wrong shapes: {_listed(wrong)}")


def _listed(names: Iterable[str]) -> str:
    return first_of(sorted(names, key=dot_natural_key), _MOST_NAMED)

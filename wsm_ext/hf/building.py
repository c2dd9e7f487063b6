"""Make a transformers model for streaming of its folder.

The module is built with its parameters on the meta device, where they cost nothing, and its buffers
real. `names` finds the tensor of each parameter and persistent buffer; what `stream`
gets is a Checkpoint under the module's names. No tensor is read here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.auto_factory import _get_model_class

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.image import CheckpointError
from .folder import read_config, refuse_endless, refuse_unusual_weights
from .names import meta_parameter, place

_log = logging.getLogger("wsm_ext")

# None and a dict: as transformers takes them.
Dtype = str | torch.dtype | Mapping[str, str | torch.dtype] | None


def prepare(
    folder: Path,
    opened: Checkpoint | None = None,
    *,
    dtype: Dtype = "auto",
    auto_class: Any = None,
) -> tuple[PreTrainedModel, Checkpoint]:
    """The model with its parameters on meta, and the checkpoint under the model's names.

    `opened`: the folder's checkpoint, if somebody has opened it already.
    """
    whole = read_config(folder)
    refuse_unusual_weights(folder, whole)
    checkpoint = Checkpoint.open(folder) if opened is None else opened
    refuse_endless(folder, whole, checkpoint)
    with _faults_of_config(folder):
        model_class = _model_class(whole, auto_class)
        config = _config_of(model_class, whole, folder)
    main_dtype = _main_dtype(dtype, config, checkpoint)
    with _faults_of_config(folder):
        model = build_model(config, model_class, main_dtype)

    images, computed = place(model, checkpoint, main_dtype)

    _load_generation_config(model, folder)
    _never_compile(model)
    model.eval()
    view = {name: replace(image, name=name) for name, image in images.items()}
    return model, replace(checkpoint, tensors=view, computed=computed)


@contextmanager
def _faults_of_config(folder: Path) -> Iterator[None]:
    """A config may have passed its class, and still make no model."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot build the model that {folder / 'config.json'} describes:"
            f" {type(error).__name__}: {error}"
        ) from error


def _main_dtype(dtype: Dtype, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    if dtype == "auto":
        return _own_dtype(config, checkpoint)
    if dtype is None:  # as in transformers
        return torch.get_default_dtype()
    if isinstance(dtype, Mapping):
        main = dtype.get("", torch.get_default_dtype())
        _log.warning("dtype=%s: all modules get %s, as in transformers", dict(dtype), main)
        return _main_dtype(main, config, checkpoint)
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r}: not a dtype of floats, its name, a dict of them, or None;"
            ' "auto" takes the checkpoint\'s own'
        )
    return named


def _own_dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    usual = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    dtypes = (image.dtype for image in checkpoint.tensors.values())
    return next((dtype for dtype in dtypes if dtype in usual), torch.float32)


# Which class


def _model_class(config: PreTrainedConfig, asked: Any) -> type[PreTrainedModel]:
    """The class that is asked for, or that the config names first."""
    if asked is None:
        names = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
        asked = names[0]
    named: Any = getattr(transformers, asked, None) if isinstance(asked, str) else asked
    mapping = getattr(named, "_model_mapping", None)  # of an auto class
    if mapping is not None and type(config) in mapping:
        chosen: type[PreTrainedModel] = _get_model_class(config, mapping)
        return chosen
    if mapping is not None:
        raise CheckpointError(
            f"{named.__name__} of transformers {transformers.__version__} has no model for"
            f" {type(config).__name__}; pass another auto_class"
        )
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named
    raise CheckpointError(
        f"{asked!r} is not a model class of transformers {transformers.__version__}; "
        'pass auto_class, for example auto_class="AutoModelForCausalLM"'
    )


def _config_of(
    model_class: type[PreTrainedModel], whole: PreTrainedConfig, folder: Path
) -> PreTrainedConfig:
    """The config of the class, which may be that of a part of the model in the folder."""
    wanted: Any = model_class.config_class
    if wanted is None or isinstance(whole, wanted):
        return whole
    text = whole.get_text_config()
    if type(text) is wanted:
        return text
    config: PreTrainedConfig = wanted.from_pretrained(folder, local_files_only=True)
    return config  # its class may have taken a part of the file


# Building


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside get meta parameters; one that is registered twice stays one."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            twin = getattr(param, "_wsm_meta_twin", None)
            if twin is None:
                twin = meta_parameter(param, param.dtype)
                param._wsm_meta_twin = twin  # type: ignore[attr-defined]
            param = twin
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_model(
    config: PreTrainedConfig, model_class: type[PreTrainedModel], dtype: torch.dtype
) -> PreTrainedModel:
    with torch.device("cpu"):  # buffers lie there, whatever default device the caller has set
        with _parameters_on_meta(), no_init_weights():
            model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
        # As from_pretrained does, outside of the model's dtype. The parameters are marked as
        # initialised, so this touches buffers alone.
        model.initialize_weights()
    return model


def _load_generation_config(model: PreTrainedModel, folder: Path) -> None:
    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
        )


def _never_compile(model: PreTrainedModel) -> None:
    """With a static cache `generate` would compile the forward, and capture graphs across units."""
    decide = getattr(model, "_valid_auto_compile_criteria", None)
    if decide is None:
        return

    def refuse(model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        if decide(model_kwargs, generation_config):
            _log.warning(
                "generate() would compile the forward pass; a streamed model runs uncompiled"
            )
        return False

    model._valid_auto_compile_criteria = refuse

"""Make a transformers model for streaming of its folder.

The module is built with its parameters on the meta device, where they cost nothing, and its buffers
real. `names` finds the tensor of each parameter and persistent buffer; what `stream`
gets is a Checkpoint under the module's names. No tensor is read here.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.image import CheckpointError
from .names import meta_parameter, place

_log = logging.getLogger("wsm_ext")

_LAYER_COUNTS = (
    *("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers"),
    *("decoder_layers", "n_layer", "n_layers"),
)
_MOST_LAYERS = 10_000
_VARIANT = re.compile(
    r"model\.(?:safetensors\.index\.)?([^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|json)"
)


def prepare(
    folder: Path,
    opened: Checkpoint | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    auto_class: Any = None,
) -> tuple[PreTrainedModel, Checkpoint]:
    """The model with its parameters on meta, and the checkpoint under the model's names.

    `opened`: the folder's checkpoint, if somebody has opened it already.
    """
    config = _read_config(folder)
    _refuse_unusual_weights(folder, config)
    checkpoint = Checkpoint.open(folder) if opened is None else opened
    _refuse_endless(folder, config, checkpoint)
    main_dtype = _main_dtype(dtype, config, checkpoint)
    try:
        model = build_model(config, auto_class, main_dtype)
    except CheckpointError:
        raise
    except Exception as error:  # a config may have passed its class, and still make no model
        raise CheckpointError(
            f"transformers cannot build the model that {folder / 'config.json'} describes:"
            f" {type(error).__name__}: {error}"
        ) from error

    images, computed = place(model, checkpoint, main_dtype)

    _load_generation_config(model, folder)
    _never_compile(model)
    model.eval()
    view = {name: replace(image, name=name) for name, image in images.items()}
    return model, replace(checkpoint, tensors=view, computed=computed)


def _read_config(folder: Path) -> PreTrainedConfig:
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), not a model: merge it into its base"
            " model first (peft's merge_and_unload), or stream the base model and put the adapter"
            " on it"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json: it is not a transformers model{_instead(folder)}"
        )
    try:
        # Code that comes with a checkpoint is never run, nor is anybody asked whether it may be.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config is validated by its own class, as that likes
        raise CheckpointError(_unreadable(folder, error)) from error
    _refuse_kernels(folder, config)
    _refuse_quantized(folder, config)
    return config


def _instead(folder: Path) -> str:
    if (folder / "model_index.json").is_file():
        return (
            ", but a diffusers pipeline (model_index.json): load its models with diffusers, and"
            " stream() them"
        )
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"; its folders {', '.join(inner)} have one: give one of them" if inner else ""


def _unreadable(folder: Path, error: Exception) -> str:
    try:
        described = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError:
        described = None
    if isinstance(described, dict) and "auto_map" in described:
        return (
            f"{folder}: its model type {described.get('model_type')!r} is not one of transformers"
            f" {transformers.__version__}, and code that comes with a checkpoint (auto_map) is"
            " never run: build the module yourself, and stream() it"
        )
    return f"{folder / 'config.json'} cannot be read by transformers: {error}"


def _parts_of(config: PreTrainedConfig) -> list[PreTrainedConfig | None]:
    """The config itself, and those of its text, vision and other parts."""
    return [config, *(getattr(config, name, None) for name in config.sub_configs)]


def _refuse_kernels(folder: Path, config: PreTrainedConfig) -> None:
    for part in _parts_of(config):
        attention = getattr(part, "_attn_implementation", None)
        if isinstance(attention, str) and "/" in attention:
            raise CheckpointError(
                f"{folder}: config.json asks for the attention kernel {attention!r}, code from the"
                " hub, which is never run: take attn_implementation out of config.json"
            )


def _refuse_quantized(folder: Path, config: PreTrainedConfig) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, Mapping)
        else getattr(quantization, "quant_method", None)
    )
    raise CheckpointError(
        f"{folder} is quantized (quantization_config: {getattr(method, 'value', method)}), and"
        " quantized models are not supported: take the model's unquantized checkpoint, or load this"
        " one with transformers, call dequantize(), and save it with save_pretrained()"
    )


def _refuse_endless(folder: Path, config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """Layers are built one by one before any is missed: a config may not ask for any number."""
    most = max(_MOST_LAYERS, len(checkpoint.tensors))
    for part in _parts_of(config):
        for name in _LAYER_COUNTS:
            count = getattr(part, name, None)
            if isinstance(count, int) and count > most:
                raise CheckpointError(
                    f"{folder / 'config.json'}: {name} is {count}, and the checkpoint has"
                    f" {len(checkpoint.tensors)} tensors: is it this model's?"
                )


def _refuse_unusual_weights(folder: Path, config: PreTrainedConfig) -> None:
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        raise CheckpointError(
            f"{folder}: config.json names its weights itself (transformers_weights: {named}), which"
            " is not supported: rename that file to model.safetensors, and take the entry out"
        )
    names = {path.name for path in folder.glob("model*.safetensors*")}
    if not names & {"model.safetensors", "model.safetensors.index.json"}:
        variants = {match[1] for name in names if (match := _VARIANT.fullmatch(name))}
        if variants:
            raise CheckpointError(
                f"{folder} has its weights as a variant only ({', '.join(sorted(variants))}), which"
                " from_pretrained does not choose: rename the file to model.safetensors, or the"
                " index to model.safetensors.index.json"
            )


def _main_dtype(
    dtype: str | torch.dtype, config: PreTrainedConfig, checkpoint: Checkpoint
) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        named = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise ValueError(f'dtype={dtype!r}: not a dtype; "auto" takes the checkpoint\'s own')
        return named
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    usual = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    dtypes = (image.dtype for image in checkpoint.tensors.values())
    return next((dtype for dtype in dtypes if dtype in usual), torch.float32)


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


def build_model(config: PreTrainedConfig, auto_class: Any, dtype: torch.dtype) -> PreTrainedModel:
    build = _builder(config, auto_class)
    with torch.device("cpu"):  # buffers lie there, whatever default device the caller has set
        with _parameters_on_meta(), no_init_weights():
            model = build(config, dtype=dtype)
        # As from_pretrained does, outside of the model's dtype. The parameters are marked as
        # initialised, so this touches buffers alone.
        model.initialize_weights()
    return model


def _builder(config: PreTrainedConfig, auto_class: Any) -> Any:
    if auto_class is None:
        names = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
        auto_class = names[0]
    named: Any = auto_class
    if isinstance(auto_class, str):
        named = getattr(transformers, auto_class, None)
    if hasattr(named, "from_config"):
        return partial(named.from_config, trust_remote_code=False)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        model_class: Any = named
        return model_class._from_config
    raise CheckpointError(
        f"{auto_class!r} is not a model class of transformers {transformers.__version__}; "
        'pass auto_class, for example auto_class="AutoModelForCausalLM"'
    )


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

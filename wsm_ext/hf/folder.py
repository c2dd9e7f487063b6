"""A transformers model's folder: its config, and what of it is refused before anything is built."""

from __future__ import annotations

import json
import re
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files import GGUF_ADVICE
from ..checkpoints.image import CheckpointError
from .quantised import refuse_quantised_folder

_LAYER_COUNTS = (
    *("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers"),
    *("decoder_layers", "n_layer", "n_layers"),
)
_MOST_LAYERS = 10_000
_VARIANT = re.compile(
    r"model\.(?:safetensors\.index\.)?([^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|json)"
)


def read_config(folder: Path) -> PreTrainedConfig:
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), not a model: merge it into its base"
            " model first (peft's merge_and_unload), or stream the base model and put the adapter"
            " on it"
        )
    refuse_quantised_folder(folder)
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        if ggufs and not any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder} has GGUF files only ({', '.join(ggufs)}){GGUF_ADVICE}")
        raise CheckpointError(
            f"{folder} has no config.json: it is not a transformers model{_instead(folder)}"
        )
    try:
        # Code that comes with a checkpoint is never run, nor is anybody asked whether it may be.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config is validated by its own class, as that likes
        raise CheckpointError(_unreadable(folder, error)) from error
    _refuse_kernels(folder, config)
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


def parts_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config itself, and those of its text, vision and other parts, at any depth."""
    inner = [getattr(config, name, None) for name in config.sub_configs]
    return [
        config,
        *(p for part in inner if isinstance(part, PreTrainedConfig) for p in parts_of(part)),
    ]


def _refuse_kernels(folder: Path, config: PreTrainedConfig) -> None:
    for part in parts_of(config):
        attention = getattr(part, "_attn_implementation", None)
        if isinstance(attention, str) and "/" in attention:
            raise CheckpointError(
                f"{folder}: config.json asks for the attention kernel {attention!r}, code from the"
                " hub, which is never run: take attn_implementation out of config.json"
            )


def refuse_endless(folder: Path, config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """Layers are built one by one before any is missed: a config may not ask for any number."""
    most = max(_MOST_LAYERS, len(checkpoint.tensors))
    for part in parts_of(config):
        for name in _LAYER_COUNTS:
            count = getattr(part, name, None)
            if isinstance(count, int) and count > most:
                raise CheckpointError(
                    f"{folder / 'config.json'}: {name} is {count}, and the checkpoint has"
                    f" {len(checkpoint.tensors)} tensors: is it this model's?"
                )


def refuse_unusual_weights(folder: Path, config: PreTrainedConfig) -> None:
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

"""What is refused, and how a user meets it: the second table of docs/compatibility.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationMethod

import wsm_ext as wsm

BUDGETS = {"device": "cpu", "device_memory": "2MiB", "host_memory": "512KiB"}


@dataclass(frozen=True)
class Refusal:
    """`attempt` gets the folder of a small Llama, and must raise what matches `message`."""

    what: str
    message: str
    attempt: Callable[[Path], object]
    instead: str


def _load(folder: Path) -> object:
    return wsm.from_pretrained(folder, **BUDGETS)


def _with_config(**values: object) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return _load(folder)

    return attempt


def _renamed(name: str) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        (folder / "model.safetensors").rename(folder / name)
        return _load(folder)

    return attempt


def _with_file(name: str, content: str) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        (folder / name).write_text(content)
        return _load(folder)

    return attempt


def _without(name: str) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        (folder / name).unlink()
        return _load(folder)

    return attempt


def _pipeline(folder: Path) -> object:
    (folder / "config.json").rename(folder / "model_index.json")
    return _load(folder)


def _in_a_subfolder(folder: Path) -> object:
    (folder / "text_encoder").mkdir()
    (folder / "config.json").rename(folder / "text_encoder" / "config.json")
    return _load(folder)


def _headless(folder: Path) -> object:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    return _load(folder)


class Int4Weight(torch.Tensor):
    """Stands for the quantised tensors of torchao."""


class Params4bit(nn.Parameter):
    """Stands for those of bitsandbytes."""


def _quantised_module(kind: type, checkpoint: bool) -> Callable[[Path], object]:
    def attempt(folder: Path) -> object:
        linear = nn.Linear(4, 4, bias=False)
        save_file({"weight": linear.weight.detach().clone()}, folder / "linear.safetensors")
        weight = torch.randn(4, 4).as_subclass(kind)
        weight._is_param = True
        linear._parameters["weight"] = weight
        return wsm.stream(linear, folder / "linear.safetensors" if checkpoint else None, **BUDGETS)

    return attempt


def _other_dtype(folder: Path) -> object:
    save_file({"weight": torch.zeros(4, 4, dtype=torch.bfloat16)}, folder / "linear.safetensors")
    return wsm.stream(nn.Linear(4, 4, bias=False), folder / "linear.safetensors", **BUDGETS)


def _with_scales(folder: Path) -> object:
    file = folder / "model.safetensors"
    scales = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    save_file(load_file(file) | scales, file, metadata={"format": "pt"})
    return _load(folder)


def _quantised_by_transformers(folder: Path) -> object:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.is_quantized, model.quantization_method = True, QuantizationMethod.FP8
    return wsm.stream(model, **BUDGETS)


def _gguf(folder: Path) -> Path:
    """What its bytes say counts, whatever its name."""
    inner = folder / "gguf"
    inner.mkdir()
    (inner / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    return inner / "model.gguf"


_CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}

REFUSALS = [
    Refusal(
        "a quantised checkpoint (GPTQ, AWQ, torchao, ...)",
        r"is quantised \(gptq\), and quantised models are not supported yet: take the model's"
        r" unquantised checkpoint$",
        _with_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "the unquantised checkpoint",
    ),
    Refusal(
        "one that transformers can load unquantised (FP8, MXFP4, compressed-tensors)",
        r"is quantised \(fp8\).*load this one with quantization_config=FineGrainedFP8Config"
        r"\(dequantize=True\).*save_pretrained\(folder, save_original_format=False\)",
        _with_config(quantization_config={"quant_method": "fp8"}),
        "the unquantised checkpoint; or load it with"
        " `quantization_config=XConfig(dequantize=True)`, and"
        " `save_pretrained(folder, save_original_format=False)`",
    ),
    Refusal(
        "bitsandbytes",
        r"is quantised \(bitsandbytes\).*call dequantize\(\), and save_pretrained\(folder\)",
        _with_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "the unquantised checkpoint; or load it, `dequantize()`, `save_pretrained(folder)`",
    ),
    Refusal(
        "a part of a model that is quantised (`text_config`, ...)",
        r"is quantised \(awq\)",
        _with_config(text_config={"quantization_config": {"quant_method": "awq"}}),
        "the unquantised checkpoint",
    ),
    Refusal(
        "scales beside the weights that config.json does not know of",
        r"the checkpoint is quantised, though config.json does not say so: it has"
        r" model.layers.0.mlp.up_proj.weight_scale. Take",
        _with_scales,
        "the unquantised checkpoint",
    ),
    Refusal(
        "`stream()`: a module that transformers has quantised",
        r"^the module \(LlamaForCausalLM\) is quantised \(fp8\).*dequantize=True",
        _quantised_by_transformers,
        "as for its checkpoint",
    ),
    Refusal(
        "a GGUF file",
        r"model.gguf is a GGUF file, which is not supported.*gguf_file=",
        lambda folder: wsm.from_pretrained(_gguf(folder), **BUDGETS),
        "the safetensors files; or load it with `gguf_file=...` and"
        " `quantization_config=GgufConfig(dequantize=True)`, and `save_pretrained`",
    ),
    Refusal(
        "a folder of GGUF files",
        r"has GGUF files only \(model.gguf\), which is not supported.*gguf_file=",
        lambda folder: _load(_gguf(folder).parent),
        "the same",
    ),
    Refusal(
        "a dtype of whole numbers",
        r"dtype=torch.int8: not a dtype of floats, its name, a dict of them, or None",
        lambda folder: wsm.from_pretrained(folder, dtype=torch.int8, **BUDGETS),
        "a dtype of floats; None and a dict are taken as transformers takes them",
    ),
    Refusal(
        "a module with torchao's tensors",
        r"'weight' is a refusals.Int4Weight: only plain tensors.*stream the module",
        _quantised_module(Int4Weight, checkpoint=False),
        "stream the module before it is quantised",
    ),
    Refusal(
        "the same with a checkpoint beside it",
        r"'weight' is a refusals.Int4Weight: only plain tensors.*stream the module",
        _quantised_module(Int4Weight, checkpoint=True),
        "stream the module before it is quantised",
    ),
    Refusal(
        "a module with bitsandbytes' parameters",
        r"'weight' is a refusals.Params4bit: only plain tensors.*stream the module",
        _quantised_module(Params4bit, checkpoint=False),
        "stream the module before it is quantised",
    ),
    Refusal(
        "an adapter's folder (LoRA)",
        r"holds an adapter .*merge it into its base",
        _with_file("adapter_config.json", "{}"),
        "the merged model; or the base model, with the adapter put on it",
    ),
    Refusal(
        "code that comes with a checkpoint (`auto_map`)",
        r"'own' is not one of transformers.*never run: build the module yourself",
        _with_config(model_type="own", auto_map=_CODE),
        "build the module, and `stream()` it",
    ),
    Refusal(
        "a kernel from the hub, asked for by config.json",
        r"asks for the attention kernel 'owner/kernel', code from the hub",
        _with_config(attn_implementation="owner/kernel"),
        "take `attn_implementation` out of config.json",
    ),
    Refusal(
        "pickled weights (`.bin`, `.pt`)",
        r"no \*\.safetensors file; convert 'pytorch_model.bin' to safetensors",
        _renamed("pytorch_model.bin"),
        "`save_pretrained()` with transformers",
    ),
    Refusal(
        "weights only as a variant",
        r"as a variant only \(fp16\).*rename the file to model.safetensors",
        _renamed("model.fp16.safetensors"),
        "rename the file",
    ),
    Refusal(
        "an index only as a variant",
        r"as a variant only \(fp16\).*rename the file to model.safetensors",
        _renamed("model.safetensors.index.fp16.json"),
        "rename the index",
    ),
    Refusal(
        "a config.json that names its weights itself",
        r"transformers_weights: other.safetensors\), which is not supported: rename that file",
        _with_config(transformers_weights="other.safetensors"),
        "rename the file, take the entry out",
    ),
    Refusal(
        "a folder without config.json",
        r"has no config.json: it is not a transformers model$",
        _without("config.json"),
        "`stream()`, which needs none",
    ),
    Refusal(
        "a folder whose models lie in subfolders",
        r"has no config.json.*its folders text_encoder have one: give one of them",
        _in_a_subfolder,
        "the subfolder's path",
    ),
    Refusal(
        "a diffusers pipeline's folder",
        r"has no config.json.*but a diffusers pipeline.*load its models with diffusers",
        _pipeline,
        "diffusers loads the models, `stream()` streams them",
    ),
    Refusal(
        "a config.json that transformers cannot read",
        r"config.json cannot be read by transformers: ",
        _with_file("config.json", "{"),
        "download it again",
    ),
    Refusal(
        "a parameter that the checkpoint lacks (a new head)",
        r"parameters that the checkpoint lacks: lm_head.weight",
        _headless,
        "`auto_class` of the model that was saved; or `save_pretrained()` of the whole model",
    ),
    Refusal(
        "`stream()`: a checkpoint of another dtype than the module",
        r"weight is torch.float32, the checkpoint's weight is torch.bfloat16; build the module",
        _other_dtype,
        "build the module with the checkpoint's dtype; `from_pretrained` casts",
    ),
]

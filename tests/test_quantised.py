"""Quantised models are known as such, and the way out that is advised works."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    Mxfp4Config,
)

import wsm_ext as wsm
from wsm_ext.checkpoints.image import CheckpointError
from wsm_ext.hf.synthetic import make_llama_checkpoint

BUDGETS: dict[str, Any] = {"device": "cpu", "device_memory": "8MiB", "host_memory": "2MiB"}
IDS = torch.tensor([[1, 2, 3, 4]])


def rewrite(folder: Path, method: dict[str, Any], change: Any) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))


def fp8(folder: Path) -> Any:
    """Weights in blocks of 16 x 16 with a scale each, as DeepSeek-V3 has them."""
    make_llama_checkpoint(
        folder, shards=1, layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocab=64
    )

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in [name for name in tensors if "proj" in name]:
            blocks = [size // 16 for size in tensors[name].shape]
            tensors[name] = (tensors[name].float() * 128).clamp(-400, 400).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(blocks) / 64
        return tensors

    method = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    rewrite(folder, method, change)
    return FineGrainedFP8Config(dequantize=True)


def mxfp4(folder: Path) -> Any:
    """Experts as gpt-oss has them: two values in a byte, an exponent for each 32."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
    config = GptOssConfig(**sizes, **heads, **experts, eos_token_id=None)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, rows, columns = tensors.pop(name).shape
            shape = (experts, columns, rows // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full(shape[:-1], 120, dtype=torch.uint8)
        return tensors

    rewrite(folder, {"quant_method": "mxfp4"}, change)
    return Mxfp4Config(dequantize=True)


@pytest.mark.parametrize("make", [fp8, mxfp4])
def test_what_the_refusal_advises_works(make: Any, tmp_path: Path) -> None:
    config = make(tmp_path / "quantised")
    with pytest.raises(CheckpointError) as refused:
        wsm.from_pretrained(tmp_path / "quantised", **BUDGETS)
    assert f"quantization_config={type(config).__name__}(dequantize=True)" in str(refused.value)
    assert "save_pretrained(folder, save_original_format=False)" in str(refused.value)
    # To the letter:
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", quantization_config=config)
    model.save_pretrained(tmp_path / "plain", save_original_format=False)
    with torch.no_grad(), wsm.from_pretrained(tmp_path / "plain", **BUDGETS) as streamed:
        logits = streamed(IDS).logits
    model = model.requires_grad_(False)
    assert torch.equal(logits, model(IDS).logits)
    with wsm.stream(model, **BUDGETS) as streamed:  # nor is the model itself quantised any more
        assert torch.equal(streamed(IDS).logits, logits)


def quantizer(method: str) -> SimpleNamespace:
    return SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))


def config(**values: Any) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=1, **values)


@pytest.mark.parametrize(
    ("attributes", "method"),
    [
        ({"hf_quantizer": quantizer("awq")}, "awq"),
        ({"is_quantized": True, "quantization_method": "gptq"}, "gptq"),
        ({"is_quantized": True}, "by is_quantized"),
        ({"quantization_scheme": object()}, "compressed-tensors"),
        ({"config": config(quantization_config={"quant_method": "hqq"})}, "hqq"),
        ({"config": config(text_config={"quantization_config": {"quant_method": "fp8"}})}, "fp8"),
        (
            {"config": config(part=config(quantization_config=quantizer("x").quantization_config))},
            "x",
        ),
        ({"is_quantized": False, "config": config(quantization_config={})}, None),
        ({"config": config(quantization_config=None)}, None),
    ],
)
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_quantised_module_is_known_by_any_sign(
    attributes: dict[str, Any], method: str | None, inner: bool, checkpoint: bool, tmp_path: Path
) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    for name, value in attributes.items():
        setattr(module[1] if inner else module, name, value)
    files = tmp_path if checkpoint else None
    if method is None:
        wsm.stream(module, files, **BUDGETS).close()
        return
    where = "module '1'" if inner else r"the module \(Sequential\)"
    with pytest.raises(ValueError, match=rf"^{where} is quantised \(.*{method}.*\)"):
        wsm.stream(module, files, **BUDGETS)


def test_fp8_without_scales_is_only_a_dtype(tmp_path: Path) -> None:
    make_llama_checkpoint(
        tmp_path, shards=1, layers=1, hidden=32, intermediate=32, heads=2, kv_heads=2, vocab=32
    )
    file = tmp_path / "model.safetensors"
    tensors = {
        name: value.to(torch.float8_e4m3fn) if "proj" in name else value
        for name, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    with wsm.from_pretrained(tmp_path, **BUDGETS) as streamed:
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(streamed.fetch(name), tensors[name].to(torch.bfloat16))


def test_a_gguf_file_is_told_that_it_is_one(tmp_path: Path) -> None:
    for name in ("model.gguf", "model.safetensors"):  # by its name, by its bytes
        (tmp_path / name).write_bytes(b"GGUF" + bytes(60) if name != "model.gguf" else b"")
        for source in (tmp_path / name, [tmp_path / name]):
            with pytest.raises(CheckpointError, match=rf"{name} is a GGUF file.*gguf_file="):
                wsm.stream(nn.Linear(2, 2), source, **BUDGETS)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has GGUF files only \('model.gguf'\)"):
        wsm.stream(nn.Linear(2, 2), tmp_path, **BUDGETS)

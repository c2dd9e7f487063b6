"""A part of a checkpoint: surplus tensors are told, the class's own config is taken."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_table import FAMILIES
from safetensors.torch import load_file, save_file

import wsm_ext as wsm
from wsm_ext.checkpoints.image import CheckpointError

BUDGETS: dict[str, Any] = {
    "device": "cpu",
    "device_memory": "2MiB",
    "host_memory": "512KiB",
    "config": {"home_bytes": 0, "poison": True},
}
IDS = torch.tensor([[5, 9, 17, 33]])
FAMILY = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return cache(lambda name: FAMILY[name].save(tmp_path_factory.mktemp("model")))


def hidden(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


# Those that transformers finds in the larger checkpoint.
@pytest.mark.parametrize(
    ("family", "auto_class", "surplus"),
    [
        ("Llama", "AutoModel", "lm_head.weight"),
        ("Llama", "LlamaModel", "lm_head.weight"),
        ("CLIP", "CLIPTextModel", "vision_model.embeddings.class_embedding"),
        ("CLIP", "CLIPVisionModel", "text_model.embeddings.position_embedding.weight"),
        ("Qwen2-VL", "Qwen2VLTextModel", "visual.blocks.0.attn.proj.bias"),
        ("T5", "T5EncoderModel", None),
        ("Gemma 3 (images)", "AutoModel", None),
    ],
)
def test_a_part_is_that_of_transformers(family, auto_class, surplus, saved, caplog):
    folder = saved(family)
    reference = getattr(transformers, auto_class).from_pretrained(folder).eval()
    inputs = {"input_ids": IDS}
    if auto_class == "CLIPVisionModel":
        inputs = {"pixel_values": torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)}
    with (
        caplog.at_level(logging.WARNING, "wsm_ext"),
        wsm.from_pretrained(folder, auto_class=auto_class, **BUDGETS) as model,
    ):
        assert isinstance(model, type(reference))
        for name, parameter in reference.named_parameters():
            assert torch.equal(model.fetch(name), parameter), name
        assert torch.equal(
            hidden(model, **inputs), hidden(reference.requires_grad_(False), **inputs)
        )
    if surplus is not None:
        assert "tensors that the model has no place for: " in caplog.text
        assert surplus in caplog.text


# Those whose names transformers does not find: it makes up all weights.
@pytest.mark.parametrize("auto_class", ["Gemma3ForCausalLM", "Gemma3TextModel"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_text_model_under_another_prefix(auto_class, prefix, saved, tmp_path):
    folder = saved("Gemma 3 (images)")
    tensors = load_file(folder / "model.safetensors")
    old = "language_model.model."
    renamed = {prefix + n.removeprefix(old) if old in n else n: t for n, t in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    whole = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    text = whole.model.language_model.requires_grad_(False)
    with wsm.from_pretrained(tmp_path, auto_class=auto_class, **BUDGETS) as model:
        assert type(model).__name__ == auto_class
        inner = "model." if auto_class == "Gemma3ForCausalLM" else ""
        for name, parameter in text.named_parameters():
            assert torch.equal(model.fetch(inner + name), parameter), name
        ours = model(IDS)
        if auto_class == "Gemma3TextModel":
            assert torch.equal(ours[0], text(IDS)[0])
        else:
            assert torch.equal(ours.logits, whole.lm_head(text(IDS)[0]))


def test_what_is_nowhere_is_named_all_the_same(saved):
    with pytest.raises(CheckpointError, match=r"checkpoint lacks: embeddings.LayerNorm.bias"):
        wsm.from_pretrained(saved("GPT-2"), auto_class="BertModel", **BUDGETS)


def test_an_auto_class_without_a_model_of_this_kind_says_so(saved):
    with pytest.raises(
        CheckpointError, match=r"AutoModelForCTC of .* has no model for LlamaConfig"
    ):
        wsm.from_pretrained(saved("Llama"), auto_class="AutoModelForCTC", **BUDGETS)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ({}, torch.float32),
        ({"": "bfloat16", "text_config": "float16"}, torch.bfloat16),
        ({"text_config": torch.float16}, torch.float32),
        ("torch.bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_dtypes_as_transformers_takes_them(dtype, expected, saved):
    with wsm.from_pretrained(saved("Llama"), dtype=dtype, **BUDGETS) as model:
        assert model.fetch("model.norm.weight").dtype == expected
    theirs = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    reference = transformers.AutoModelForCausalLM.from_pretrained(saved("Llama"), dtype=theirs)
    assert reference.dtype == expected


@pytest.mark.parametrize("dtype", [3, "int8", torch.int64, {"": 3}, [torch.float16], "Tensor"])
def test_what_is_not_a_dtype_is_refused(dtype, saved):
    with pytest.raises(ValueError, match="not a dtype of floats, its name, a dict of them, or"):
        wsm.from_pretrained(saved("Llama"), dtype=dtype, **BUDGETS)


def test_the_quantised_part_of_a_model_is_seen(saved, tmp_path):
    content = json.loads((saved("Gemma 3 (images)") / "config.json").read_text())
    content["text_config"]["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"is quantised \(awq\)"):
        wsm.from_pretrained(tmp_path, auto_class="Gemma3ForCausalLM", **BUDGETS)


def test_the_config_of_a_part_is_the_class_s_own(saved):
    folder: Path = saved("CLIP")
    with wsm.from_pretrained(folder, auto_class="CLIPTextModel", **BUDGETS) as model:
        ours = model.config.to_dict()
    theirs = transformers.CLIPTextModel.from_pretrained(folder).config.to_dict()
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differing <= {"_name_or_path", "dtype"}

"""Tiny random models of transformers' families, and what is done with them: the rows of
docs/compatibility.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 96
_IDS = torch.tensor([[5, 9, 17, 33, 65, 2, 4, 8]])
_SHORT = torch.tensor([[5, 9, 17, 3]])

# By transformers' usual names.
_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Family:
    """One row. `decoding` and `units` name further cases, `casts` pairs of dtypes: file, asked."""

    name: str
    model: str  # the class's name
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]] = lambda: {"input_ids": _IDS}
    generates: bool = True
    decoding: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    casts: tuple[tuple[str, str], ...] = ()

    @property
    def missing(self) -> str | None:
        """What the installed transformers lacks of this family."""
        return next((n for n in (self.model, self.config) if not hasattr(transformers, n)), None)

    @property
    def cases(self) -> list[str]:
        """Names of what is compared with the resident model."""
        return [
            "outputs",
            *(["generate"] if self.generates else []),
            *self.decoding,
            *(f"units {mode}" for mode in self.units),
            *(f"{file} as {asked}" for file, asked in self.casts),
        ]

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 7) -> Any:
        """The model with other values in each tensor, so that no two could be exchanged unseen."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.options)
        config.dtype = dtype
        model = getattr(transformers, self.model)(config).to(dtype).eval()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.05 * torch.randn_like(tensor))
        return model

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        self.build(dtype).save_pretrained(folder)
        return folder

    def resident(self, folder: Path, device: torch.device, **options: Any) -> Any:
        """What transformers loads, with what decides over the last bit as it is when streamed: MKL
        sums in an order that depends on where weights begin, matmul folds if they require grad."""
        model = getattr(transformers, self.model).from_pretrained(folder, **options).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # out of the file's mapping
        return model.requires_grad_(False).to(device)


def _encoder_decoder() -> dict[str, torch.Tensor]:
    return {"input_ids": _IDS, "decoder_input_ids": _SHORT}


def _image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}


def _sound() -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32),
        "decoder_input_ids": _SHORT,
    }


def _decoder(name: str, prefix: str, **options: Any) -> Family:
    """A causal model whose config takes the usual names."""
    cases = {key: options.pop(key) for key in ("decoding", "units", "casts") if key in options}
    config = options.pop("config", f"{prefix}Config")
    kept = {key: value for key, value in (_DECODER | options).items() if value != "drop"}
    return Family(name, f"{prefix}ForCausalLM", config, kept, **cases)


_BF16 = (("bfloat16", "auto"),)
_DOWN = (("float32", "bfloat16"),)
_ALL_CASTS = (
    ("bfloat16", "auto"), ("float32", "bfloat16"), ("float32", "float16"),
    ("bfloat16", "float32"), ("float16", "bfloat16"),
)  # fmt: skip
_ALL_UNITS = ("layer", "group", "leaf")
_ALL_DECODING = ("static cache", "offloaded cache", "beam search", "assisted")
_LAYER_TYPES = ["sliding_attention", "full_attention"]

FAMILIES = [
    _decoder("Llama", "Llama", decoding=_ALL_DECODING, units=_ALL_UNITS, casts=_ALL_CASTS),
    _decoder("Mistral", "Mistral", sliding_window=4, decoding=("static cache",)),
    _decoder("Qwen2", "Qwen2", tie_word_embeddings=True, decoding=("beam search",)),
    _decoder("Qwen3", "Qwen3", units=("leaf",), casts=_BF16),
    _decoder("Qwen3-MoE", "Qwen3Moe", **_EXPERTS, units=_ALL_UNITS, casts=_DOWN),
    _decoder(
        "Mixtral", "Mixtral", num_local_experts=4, units=_ALL_UNITS, casts=_ALL_CASTS,
        decoding=("static cache", "beam search"),
    ),
    _decoder("Gemma 2", "Gemma2", sliding_window=4, decoding=_ALL_DECODING, casts=_BF16),
    _decoder(
        "Gemma 3", "Gemma3", config="Gemma3TextConfig", sliding_window=4, layer_types=_LAYER_TYPES,
        casts=_DOWN,
    ),
    _decoder("Phi-3", "Phi3", units=("group",)),
    Family(
        "GPT-2", "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4,
         "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
        decoding=_ALL_DECODING, units=_ALL_UNITS, casts=_DOWN,
    ),
    _decoder("GPT-NeoX", "GPTNeoX", num_key_value_heads="drop", head_dim="drop"),
    _decoder(
        "Falcon", "Falcon", num_kv_heads=2, num_key_value_heads="drop", head_dim="drop",
        new_decoder_architecture=True, ffn_hidden_size=96, intermediate_size="drop",
    ),
    _decoder(
        "OPT", "OPT", ffn_dim=80, word_embed_proj_dim=48, num_key_value_heads="drop",
        head_dim="drop", intermediate_size="drop",
    ),
    Family(
        "Bloom", "BloomForCausalLM", "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 1,
         "eos_token_id": None, "pad_token_id": 0},
        units=("group",),
    ),
    _decoder("OLMo 2", "Olmo2", head_dim="drop"),
    _decoder("Granite", "Granite", head_dim="drop", embedding_multiplier=3.0),
    _decoder(
        "DeepSeek-V3", "DeepseekV3", n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, moe_intermediate_size=40,
        kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        num_key_value_heads=4, head_dim="drop", casts=_DOWN, units=("group",),
    ),
    _decoder(
        "GPT-OSS", "GptOss", num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
        layer_types=_LAYER_TYPES, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        casts=_BF16,
    ),
    Family(
        "T5", "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": VOCAB, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2,
         "num_heads": 4, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
        _encoder_decoder, decoding=("beam search",), units=_ALL_UNITS,
        casts=(("float32", "float16"), ("float32", "bfloat16")),
    ),
    Family(
        "BART", "BartForConditionalGeneration", "BartConfig",
        {"vocab_size": VOCAB, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 80,
         "decoder_ffn_dim": 80, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
         "forced_eos_token_id": None},
        _encoder_decoder, decoding=("beam search", "static cache"),
    ),
    Family(
        "BERT", "BertForMaskedLM", "BertConfig",
        {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0},
        generates=False, units=_ALL_UNITS, casts=_DOWN,
    ),
    Family(
        "ViT", "ViTForImageClassification", "ViTConfig", _VISION | {"num_labels": 5}, _image,
        generates=False, units=_ALL_UNITS, casts=_DOWN,
    ),
    Family(
        "CLIP", "CLIPModel", "CLIPConfig",
        {"text_config": {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
                         "num_hidden_layers": 2, "num_attention_heads": 4,
                         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
                         "eos_token_id": 8},
         "vision_config": _VISION | {"projection_dim": 24}, "projection_dim": 24},
        lambda: {"input_ids": _IDS} | _image(), generates=False, units=("leaf",), casts=_DOWN,
    ),
    Family(
        "Whisper", "WhisperForConditionalGeneration", "WhisperConfig",
        {"vocab_size": VOCAB, "num_mel_bins": 8, "d_model": 48, "encoder_layers": 2,
         "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "max_source_positions": 16,
         "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None},
        _sound, decoding=("beam search",), casts=_DOWN,
    ),
    Family(
        "Mamba", "MambaForCausalLM", "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
        units=("layer", "group"), casts=_DOWN,
    ),
    _decoder(
        "Jamba", "Jamba", num_experts=4, num_experts_per_tok=2, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8,
        mamba_dt_rank=4, use_mamba_kernels=False, head_dim="drop", casts=_DOWN,
    ),
]  # fmt: skip

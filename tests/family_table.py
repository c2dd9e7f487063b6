"""The rows of docs/compatibility.md: families, and what is compared for each."""

from __future__ import annotations

from typing import Any

import torch
from families import Family

VOCAB = 96
_IDS = torch.tensor([[5, 9, 17, 33, 65, 2, 4, 8]])
_SHORT = torch.tensor([[5, 9, 17, 3]])

# By transformers' usual names.
_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_LATENT = {  # multi-head latent attention, and experts in groups
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 40,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_d_state": 8,
    "mamba_chunk_size": 8, "head_dim": "drop",
}  # fmt: skip
_ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": VOCAB, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def _encoder_decoder() -> dict[str, torch.Tensor]:
    return {"input_ids": _IDS, "decoder_input_ids": _SHORT}


def _image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}


def _larger_image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}


def _text_and_image() -> dict[str, torch.Tensor]:
    return {"input_ids": _IDS} | _image()


def _wave() -> dict[str, torch.Tensor]:
    return {"input_values": torch.linspace(-1, 1, 400).reshape(1, 400)}


def _sound() -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32),
        "decoder_input_ids": _SHORT,
    }


def _with_image() -> dict[str, torch.Tensor]:
    """Four patches of the image, where the text says."""
    return {"input_ids": torch.tensor([[5, 9, 90, 90, 90, 90, 7, 8]])} | _image()


def _decoder(name: str, prefix: str, **options: Any) -> Family:
    """A causal model whose config takes the usual names."""
    cases = {key: options.pop(key) for key in ("decoding", "units", "casts") if key in options}
    config = options.pop("config", f"{prefix}Config")
    kept = {key: value for key, value in (_DECODER | options).items() if value != "drop"}
    return Family(name, f"{prefix}ForCausalLM", config, kept, **cases)


_BF16 = (("bfloat16", "auto"), ("float32", "bfloat16"))
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
    _decoder("Qwen3", "Qwen3", casts=_BF16),
    _decoder("Qwen3-MoE", "Qwen3Moe", **_EXPERTS, units=_ALL_UNITS),
    _decoder(
        "Mixtral", "Mixtral", num_local_experts=4, units=_ALL_UNITS, casts=_ALL_CASTS,
        decoding=("static cache", "beam search"),
    ),
    _decoder("Gemma 2", "Gemma2", sliding_window=4, decoding=_ALL_DECODING, casts=_BF16),
    _decoder(
        "Gemma 3", "Gemma3", config="Gemma3TextConfig", sliding_window=4, layer_types=_LAYER_TYPES,
    ),
    _decoder("Phi-3", "Phi3", units=("group", "leaf")),
    Family(
        "GPT-2", "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4,
         "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
        decoding=_ALL_DECODING, units=_ALL_UNITS,
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
        units=("group", "leaf"),
    ),
    _decoder("OLMo 2", "Olmo2", head_dim="drop"),
    _decoder("Granite", "Granite", head_dim="drop", embedding_multiplier=3.0),
    _decoder("DeepSeek-V3", "DeepseekV3", **_LATENT, head_dim="drop", units=("group", "leaf")),
    _decoder(
        "GPT-OSS", "GptOss", num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
        layer_types=_LAYER_TYPES, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        casts=_BF16,
    ),
    Family(
        "T5", "T5ForConditionalGeneration", "T5Config", _T5, _encoder_decoder,
        decoding=("beam search",), units=_ALL_UNITS,
        casts=(("float32", "float16"), ("float32", "bfloat16")),
    ),
    Family(
        "BART", "BartForConditionalGeneration", "BartConfig", _SEQ2SEQ, _encoder_decoder,
        decoding=("beam search", "static cache"),
    ),
    Family("BERT", "BertForMaskedLM", "BertConfig", _ENCODER, generates=False, units=_ALL_UNITS),
    Family(
        "ViT", "ViTForImageClassification", "ViTConfig", _VISION | {"num_labels": 5}, _image,
        generates=False, units=_ALL_UNITS,
    ),
    Family(
        "CLIP", "CLIPModel", "CLIPConfig",
        {"text_config": {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
                         "num_hidden_layers": 2, "num_attention_heads": 4,
                         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
                         "eos_token_id": 8},
         "vision_config": _VISION | {"projection_dim": 24}, "projection_dim": 24},
        _text_and_image, generates=False,
    ),
    Family(
        "Whisper", "WhisperForConditionalGeneration", "WhisperConfig",
        _SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64,
                    "decoder_start_token_id": 3, "suppress_tokens": None,
                    "begin_suppress_tokens": None},
        _sound, decoding=("beam search",),
    ),
    Family(
        "Mamba", "MambaForCausalLM", "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
        units=_ALL_UNITS,
    ),
    _decoder(
        "Jamba", "Jamba", num_experts=4, num_experts_per_tok=2, attn_layer_period=2,
        attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8,
        mamba_dt_rank=4, use_mamba_kernels=False, head_dim="drop",
    ),
    # beyond those that were asked for
    _decoder("Llama 4", "Llama4", config="Llama4TextConfig", num_local_experts=4,
             intermediate_size_mlp=64, interleave_moe_layer_step=1, attention_chunk_size=8),
    _decoder("Ministral", "Ministral", sliding_window=4, layer_types=_LAYER_TYPES),
    _decoder("Gemma", "Gemma"),
    Family(
        "Gemma 3 (images)", "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": _DECODER | {"sliding_window": 4, "layer_types": _LAYER_TYPES},
         "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 90,
         "boi_token_index": 91, "eoi_token_index": 92},
    ),
    _decoder("Qwen2-MoE", "Qwen2Moe", **_EXPERTS, shared_expert_intermediate_size=56,
             head_dim="drop"),
    _decoder("Qwen3-Next", "Qwen3Next", **_EXPERTS, shared_expert_intermediate_size=40,
             linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
             linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"]),
    Family(
        "Qwen2-VL", "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {"text_config": _DECODER | {"rope_parameters": _MROPE},
         "vision_config": {"embed_dim": 32, "hidden_size": 48, "depth": 2, "num_heads": 4,
                           "mlp_ratio": 2, "patch_size": 8, "spatial_merge_size": 2,
                           "temporal_patch_size": 2}},
    ),
    Family(
        "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"text_config": _DECODER | {"rope_parameters": _MROPE},
         "vision_config": {"hidden_size": 32, "out_hidden_size": 48, "depth": 2, "num_heads": 4,
                           "intermediate_size": 48, "patch_size": 8, "spatial_merge_size": 2,
                           "temporal_patch_size": 2, "fullatt_block_indexes": [1],
                           "window_size": 32}},
    ),
    Family(
        "Qwen3-VL-MoE", "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
        {"text_config": _DECODER | _EXPERTS | {"rope_parameters": _MROPE},
         "vision_config": {"hidden_size": 32, "out_hidden_size": 48, "depth": 2, "num_heads": 4,
                           "intermediate_size": 48, "patch_size": 8, "spatial_merge_size": 2,
                           "temporal_patch_size": 2, "deepstack_visual_indexes": [0],
                           "num_position_embeddings": 16}},
        units=_ALL_UNITS,
    ),
    Family(
        "ERNIE 4.5 VL MoE", "Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VLMoeConfig",
        {"text_config": _DECODER | {"moe_num_experts": 4, "moe_k": 2,
                                    "moe_intermediate_size": [40, 24],
                                    "moe_num_shared_experts": 1,
                                    "mlp_layer_types": ["dense", "sparse"],
                                    "rope_parameters": _MROPE},
         "vision_config": {"hidden_size": 32, "depth": 2, "num_heads": 4, "intermediate_size": 48,
                           "patch_size": 8, "spatial_merge_size": 2}},
        units=_ALL_UNITS,
    ),
    _decoder("OLMoE", "Olmoe", num_experts=4, num_experts_per_tok=2, head_dim="drop"),
    _decoder("GraniteMoE", "GraniteMoe", num_local_experts=4, num_experts_per_tok=2,
             head_dim="drop"),
    _decoder("GraniteMoE-Hybrid", "GraniteMoeHybrid", **_MAMBA, num_local_experts=4,
             num_experts_per_tok=2, shared_intermediate_size=40,
             layer_types=["mamba", "attention"]),
    _decoder("DeepSeek-V2", "DeepseekV2", **_LATENT, head_dim=8),
    _decoder("GLM-4", "Glm4"),
    _decoder("GLM-4-MoE", "Glm4Moe", n_routed_experts=4, num_experts_per_tok=2,
             n_shared_experts=1, first_k_dense_replace=1, moe_intermediate_size=40, n_group=1,
             topk_group=1),
    _decoder("MiniMax", "MiniMax", num_local_experts=4, num_experts_per_tok=2, block_size=4,
             layer_types=["full_attention", "linear_attention"]),
    Family(
        "DBRX", "DbrxForCausalLM", "DbrxConfig",
        {"vocab_size": VOCAB, "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
         "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2,
                        "hidden_size": 48, "ffn_act_fn": {"name": "silu"}},
         "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
    ),
    _decoder("Phi", "Phi", head_dim="drop"),
    _decoder("PhiMoE", "Phimoe", num_local_experts=4, num_experts_per_tok=2, head_dim="drop"),
    _decoder("Starcoder2", "Starcoder2", head_dim="drop"),
    _decoder("StableLM", "StableLm", head_dim="drop", hidden_size=64),
    _decoder("Cohere", "Cohere", head_dim="drop"),
    _decoder("Nemotron", "Nemotron"),
    _decoder("Nemotron-H", "NemotronH", num_hidden_layers=4,
             layers_block_type=["mamba", "attention", "moe", "mlp"], mamba_num_heads=8,
             mamba_head_dim=12, n_groups=2, ssm_state_size=8, chunk_size=8, n_routed_experts=4,
             num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=40,
             moe_shared_expert_intermediate_size=40),
    _decoder("SmolLM3", "SmolLM3", head_dim="drop"),
    _decoder("Exaone 4", "Exaone4", head_dim="drop", sliding_window=4, layer_types=_LAYER_TYPES),
    Family(
        "GPT-J", "GPTJForCausalLM", "GPTJConfig",
        {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4,
         "rotary_dim": 8, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
    ),
    Family(
        "MPT", "MptForCausalLM", "MptConfig",
        {"vocab_size": VOCAB, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
    ),
    Family(
        "Mamba 2", "Mamba2ForCausalLM", "Mamba2Config",
        {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2,
         "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": None},
    ),
    Family(
        "FalconMamba", "FalconMambaForCausalLM", "FalconMambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
    ),
    _decoder("Falcon-H1", "FalconH1", **_MAMBA, mamba_d_ssm=96),
    _decoder("Bamba", "Bamba", **_MAMBA, attn_layer_indices=[1]),
    _decoder("Zamba2", "Zamba2", num_hidden_layers=4, head_dim="drop", num_key_value_heads=4,
             layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], num_mem_blocks=1,
             mamba_d_state=8, n_mamba_heads=8, mamba_ngroups=2, chunk_size=8,
             use_mamba_kernels=False, units=_ALL_UNITS),
    _decoder("RecurrentGemma", "RecurrentGemma", lru_width=48, attention_window_size=8,
             num_hidden_layers=3, block_types=["recurrent", "recurrent", "attention"]),
    _decoder("LFM2", "Lfm2", head_dim="drop", layer_types=["conv", "full_attention"],
             block_multiple_of=8),
    Family(
        "LLaVA", "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": _DECODER | {"model_type": "llama"},
         "vision_config": _VISION | {"model_type": "clip_vision_model"},
         "image_token_index": 90, "vision_feature_layer": -1},
        _with_image,
    ),
    Family("mT5", "MT5ForConditionalGeneration", "MT5Config", _T5, _encoder_decoder),
    Family("Marian", "MarianMTModel", "MarianConfig", _SEQ2SEQ, _encoder_decoder),
    Family(
        "Pegasus", "PegasusForConditionalGeneration", "PegasusConfig", _SEQ2SEQ, _encoder_decoder
    ),
    Family(
        "RoBERTa", "RobertaForMaskedLM", "RobertaConfig", _ENCODER | {"pad_token_id": 1},
        generates=False,
    ),
    Family(
        "DistilBERT", "DistilBertForMaskedLM", "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 4,
         "max_position_embeddings": 64},
        generates=False,
    ),
    Family(
        "ModernBERT", "ModernBertForMaskedLM", "ModernBertConfig",
        _ENCODER | {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        generates=False,
    ),
    Family(
        "DeBERTa-v2", "DebertaV2ForMaskedLM", "DebertaV2Config",
        _ENCODER | {"relative_attention": True, "position_buckets": 8}, generates=False,
    ),
    Family("NomicBERT", "NomicBertForMaskedLM", "NomicBertConfig", _ENCODER, generates=False),
    Family(
        "ELECTRA", "ElectraForMaskedLM", "ElectraConfig", _ENCODER | {"embedding_size": 32},
        generates=False,
    ),
    Family(
        "ALBERT", "AlbertForMaskedLM", "AlbertConfig", _ENCODER | {"embedding_size": 32},
        generates=False, units=_ALL_UNITS,
    ),
    Family("DINOv2", "Dinov2Model", "Dinov2Config", _VISION, _image, generates=False),
    Family(
        "Swin", "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
         "window_size": 4, "num_labels": 5},
        _larger_image, generates=False,
    ),
    Family(
        "ResNet", "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5},
        _larger_image, generates=False,
    ),
    Family(
        "ConvNeXt", "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 5},
        _larger_image, generates=False,
    ),
    Family(
        "SigLIP", "SiglipModel", "SiglipConfig",
        {"text_config": _ENCODER | {"hidden_size": 32}, "vision_config": _VISION},
        _text_and_image, generates=False,
    ),
    Family(
        "Wav2Vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config",
        {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "conv_dim": [16, 16], "conv_kernel": [4, 4],
         "conv_stride": [2, 2], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
         "num_feat_extract_layers": 2, "pad_token_id": 0},
        _wave, generates=False,
    ),
]  # fmt: skip

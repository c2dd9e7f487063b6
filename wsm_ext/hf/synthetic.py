"""Llama checkpoints of any size with random weights, for demonstrations, benchmarks and tests.

The weights are seeded and scaled so that logits are finite and differ from token to token. Values
come from one pool of random numbers, read from another place for each tensor: writing is then
limited by the disk, not by the generator. At most one shard is in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

# A prime, so that no row of a matrix repeats another one.
_POOL_SIZE = 16_777_213

PRESETS: dict[str, dict[str, int]] = {
    # A decoder layer of this shape holds 1.71 GB in bfloat16.
    "70b": {
        "hidden": 8192,
        "intermediate": 28672,
        "heads": 64,
        "kv_heads": 8,
        "vocab": 32000,
    },
    # 0.44 GB a layer: many of them beside an arena of two, if RAM is small.
    "7b": {
        "hidden": 4096,
        "intermediate": 14336,
        "heads": 32,
        "kv_heads": 8,
        "vocab": 32000,
    },
    # With 12 layers 350 MB in bfloat16.
    "demo": {"hidden": 1024, "intermediate": 2816, "heads": 16, "kv_heads": 8, "vocab": 16000},
}


@dataclass(frozen=True)
class _Weight:
    name: str
    shape: tuple[int, ...]
    mean: float
    deviation: float

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def make_llama_checkpoint(
    folder: str | os.PathLike[str],
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    dtype: torch.dtype = torch.bfloat16,
    shards: int | None = None,
    seed: int = 0,
    tie: bool = False,
) -> Path:
    """Write config.json, `shards` safetensors files (as many as layers if None), their index."""
    if hidden % heads or heads % kv_heads:
        raise ValueError(
            f"hidden {hidden} must be a multiple of heads {heads}, and heads of kv_heads {kv_heads}"
        )
    weights = list(_llama_weights(layers, hidden, intermediate, heads, kv_heads, vocab, tie))
    count = max(1, layers) if shards is None else shards
    if not 1 <= count <= len(weights):
        raise ValueError(f"shards must be between 1 and {len(weights)} (the tensors), not {count}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder, layers, hidden, intermediate, heads, kv_heads, vocab, dtype, tie)

    generator = torch.Generator().manual_seed(seed)
    largest = max(weight.count for weight in weights)
    pool = torch.rand(min(_POOL_SIZE, largest), generator=generator, device="cpu").mul_(2).sub_(1)
    scaled: dict[tuple[float, float], torch.Tensor] = {}
    index: dict[str, str] = {}
    start = 0
    for number, group in enumerate(_split(weights, count), 1):
        part = f"-{number:05}-of-{count:05}" if count > 1 else ""
        file = f"model{part}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for weight in group:
            key = (weight.mean, weight.deviation)
            if key not in scaled:
                # A uniform variable on [-1, 1] has the deviation 1 / sqrt(3).
                scaled[key] = (pool * (weight.deviation * math.sqrt(3)) + weight.mean).to(dtype)
            tensors[weight.name] = _draw(scaled[key], start, weight.shape)
            start = (start + weight.count + 7919) % pool.numel()
            index[weight.name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if count > 1:
        total = sum(weight.count for weight in weights) * dtype.itemsize
        document = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2))
    return folder


def _llama_weights(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tie: bool
) -> Iterator[_Weight]:
    kv = hidden // heads * kv_heads
    into, out = 1 / math.sqrt(hidden), 1 / math.sqrt(2 * max(1, layers))
    yield _Weight("model.embed_tokens.weight", (vocab, hidden), 0, into if tie else 1)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield _Weight(f"{at}.input_layernorm.weight", (hidden,), 1, 0.1)
        yield _Weight(f"{at}.self_attn.q_proj.weight", (hidden, hidden), 0, into)
        yield _Weight(f"{at}.self_attn.k_proj.weight", (kv, hidden), 0, into)
        yield _Weight(f"{at}.self_attn.v_proj.weight", (kv, hidden), 0, into)
        yield _Weight(f"{at}.self_attn.o_proj.weight", (hidden, hidden), 0, into * out)
        yield _Weight(f"{at}.post_attention_layernorm.weight", (hidden,), 1, 0.1)
        yield _Weight(f"{at}.mlp.gate_proj.weight", (intermediate, hidden), 0, into)
        yield _Weight(f"{at}.mlp.up_proj.weight", (intermediate, hidden), 0, into)
        yield _Weight(
            f"{at}.mlp.down_proj.weight", (hidden, intermediate), 0, out / math.sqrt(intermediate)
        )
    yield _Weight("model.norm.weight", (hidden,), 1, 0.1)
    if not tie:
        yield _Weight("lm_head.weight", (vocab, hidden), 0, into)


def _split(weights: list[_Weight], groups: int) -> Iterator[list[_Weight]]:
    """Neighbours stay together, groups are about equal in bytes, and none is empty."""
    left = sum(weight.count for weight in weights)
    group: list[_Weight] = []
    size = 0
    for position, weight in enumerate(weights):
        group.append(weight)
        size += weight.count
        rest = len(weights) - position - 1
        full = size >= left / groups or rest == groups - 1
        if groups > 1 and full:
            yield group
            left -= size
            groups -= 1
            group, size = [], 0
    yield group


def _draw(pool: torch.Tensor, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.empty(math.prod(shape), dtype=pool.dtype, device=pool.device)
    done = 0
    while done < flat.numel():
        count = min(pool.numel() - start, flat.numel() - done)
        flat[done : done + count] = pool[start : start + count]
        done += count
        start = (start + count) % pool.numel()
    return flat.view(shape)


def _write_config(
    folder: Path,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    dtype: torch.dtype,
    tie: bool,
) -> None:
    from transformers import LlamaConfig  # takes a second: `wsm --help` need not wait for it

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=131072,
        tie_word_embeddings=tie,
        dtype=dtype,
    ).save_pretrained(folder)

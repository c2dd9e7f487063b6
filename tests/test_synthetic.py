import hashlib
import json
import math

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from wsm_ext.hf.synthetic import (
    PRESETS,
    _llama_weights,
    _split,
    _Weight,
    make_llama_checkpoint,
)

TINY = {"layers": 2, "hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2, "vocab": 64}


def digests(folder):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*.safetensors")
    }


def test_the_seed_decides_every_bit(tmp_path):
    one, same, other = (
        digests(make_llama_checkpoint(tmp_path / name, shards=3, seed=seed, **TINY))
        for name, seed in (("one", 5), ("same", 5), ("other", 6))
    )
    assert one == same
    assert all(one[name] != other[name] for name in one)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("shards", [1, 2, None, 20])
def test_transformers_finds_every_weight_in_it(tmp_path, shards, tie):
    make_llama_checkpoint(tmp_path, shards=shards, tie=tie, **TINY)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    logits = model(torch.arange(12)[None]).logits.float()
    assert logits.isfinite().all()
    assert logits.argmax(-1).unique().numel() > 2


def test_the_index_lists_each_shard_as_it_is(tmp_path):
    make_llama_checkpoint(tmp_path, shards=4, dtype=torch.float16, **TINY)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    total = 0
    for file in files:
        with safe_open(tmp_path / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                assert index["weight_map"].pop(name) == file
                tensor = shard.get_tensor(name)
                assert tensor.dtype == torch.float16
                total += tensor.nbytes
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == total


def test_no_tensor_and_no_row_repeats_another(tmp_path):
    make_llama_checkpoint(tmp_path, shards=1, **TINY)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as shard:
        matrices = [shard.get_tensor(name) for name in shard.keys()]  # noqa: SIM118
    rows = [bytes(row.view(torch.uint8)) for m in matrices if m.dim() == 2 for row in m]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    ("sizes", "groups", "expected"),
    [
        ([5], 1, [[5]]),
        ([1, 1, 1, 1], 2, [[1, 1], [1, 1]]),
        ([1, 9, 1], 3, [[1], [9], [1]]),
        ([9, 1, 1], 3, [[9], [1], [1]]),
        ([1, 1, 9], 2, [[1, 1], [9]]),
        ([9, 1, 1, 1], 2, [[9], [1, 1, 1]]),
        ([1, 1, 1, 9], 3, [[1, 1], [1], [9]]),
    ],
)
def test_groups_are_whole_and_none_is_empty(sizes, groups, expected):
    weights = [_Weight(str(size), (size,), 0, 1) for size in sizes]
    found = [[weight.count for weight in group] for group in _split(weights, groups)]
    assert found == expected


def test_a_layer_of_the_70b_preset_has_the_true_size():
    shape = PRESETS["70b"]
    weights = _llama_weights(
        1, *(shape[key] for key in ("hidden", "intermediate", "heads", "kv_heads", "vocab")), False
    )
    count = sum(math.prod(w.shape) for w in weights if w.name.startswith("model.layers."))
    assert count * 2 == 1_711_308_800


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 0}, "between 1 and 21"),
        ({"shards": 22}, "between 1 and 21"),
        ({"heads": 5}, "multiple of heads 5"),
        ({"kv_heads": 3}, "heads of kv_heads 3"),
    ],
)
def test_impossible_shapes_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_llama_checkpoint(tmp_path / "new", **(TINY | change))
    assert not (tmp_path / "new").exists()

"""What a conversion makes of real tensors is what its images and arrivals make."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    PermuteForRope,
    Transpose,
)

from wsm_ext.checkpoints.checkpoint import Checkpoint
from wsm_ext.checkpoints.image import CheckpointError, assemble
from wsm_ext.hf import conversions
from wsm_ext.hf.conversions import cast, convert
from wsm_ext.modules.sources import read_tensor

CONFIG = SimpleNamespace(num_attention_heads=2)


def opened(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def random(*shape, dtype=torch.float32):
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 100, shape, dtype=dtype)


def chain(operations, sources, targets):
    """A conversion by these operations; `sources` are the patterns of its tensors, in order."""

    def run(tensors):
        collected = {pattern: [] for pattern in sources}
        for pattern, tensor in zip(sources, tensors, strict=True):
            collected[pattern].append(tensor)
        for operation in operations:
            collected = operation.convert(
                collected,
                source_patterns=list(dict.fromkeys(sources)),
                target_patterns=targets,
                config=CONFIG,
            )
        return {k: t[0] if isinstance(t, list) else t for k, t in collected.items()}

    return run


def made(folder, conversion, tensors):
    """The images; what is read by them is what the conversion makes of the tensors."""
    checkpoint = opened(folder, {str(i): t for i, t in enumerate(tensors)})
    images = convert(conversion, [checkpoint.tensors[str(i)] for i in range(len(tensors))])
    checkpoint.tensors = images
    read = {name: read_tensor(checkpoint, name) for name in images}
    wanted = conversion(tensors)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert images[name].shape == tuple(tensor.shape)
        assert torch.equal(read[name], tensor), name
    return images


EXPERTS = [random(6, 4) for _ in range(3)], [random(6, 4) for _ in range(3)]
MOVES = {
    "experts fused with two projections": (
        chain([MergeModulelist(0), Concatenate(1)], ["a"] * 3 + ["b"] * 3, ["t"]),
        [*EXPERTS[0], *EXPERTS[1]],
        {"t": 6},
    ),
    "experts stacked": (chain([MergeModulelist(0)], ["a"] * 3, ["t"]), EXPERTS[0], {"t": 3}),
    "one tensor cut in three": (
        chain([Chunk(0)], ["a"], ["q", "k", "v"]),
        [random(9, 4)],
        {"q": 1, "k": 1, "v": 1},
    ),
    "one tensor cut along its rows": (
        chain([Chunk(1)], ["a"], ["q", "k"]),
        [random(5, 8)],
        {"q": 5, "k": 5},
    ),
    "rows joined": (chain([Concatenate(1)], ["a", "b"], ["t"]), EXPERTS[0][:2], {"t": 12}),
    "experts for text and images": (
        chain([ErnieFuseAndSplitTextVisionExperts()], ["a"] * 4 + ["b"] * 4, ["text", "vision"]),
        [random(2, 3) for _ in range(8)],
        {"text": 4, "vision": 4},
    ),
    "a shape of length one turned": (
        chain([Transpose(0, 1)], ["a"], ["t"]),
        [random(1, 7)],
        {"t": 1},
    ),
    "empty tensors joined": (
        chain([Concatenate(0)], ["a", "b"], ["t"]),
        [random(0, 4), random(2, 4)],
        {"t": 1},
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_is_only_moved_becomes_extents(tmp_path, name):
    conversion, tensors, extents = MOVES[name]
    images = made(tmp_path, conversion, tensors)
    assert {name: len(image.extents) for name, image in images.items()} == extents
    assert all(image.arrival is None for image in images.values())


def scaled(tensors):
    return {"t": tensors[0] * 2 - 1}


OTHERS = {
    "many small pieces": (chain([Transpose(0, 1)], ["a"], ["t"]), [random(60, 40)]),
    "rotary halves": (chain([PermuteForRope()], ["a"], ["t"]), [random(2000, 3)]),
    "cut and permuted": (
        chain([Chunk(0), PermuteForRope(permute_layer_names=["q"])], ["qkv"], ["q", "k", "v"]),
        [random(6000, 2)],
    ),
    "arithmetic": (scaled, [random(4, 4)]),
    "a join, then a view over the seam": (
        lambda tensors: {"t": torch.cat(list(tensors)).reshape(6, 4)},
        [random(3, 4), random(3, 4)],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_than_a_few_moves_is_made_on_arrival(tmp_path, name):
    conversion, tensors = OTHERS[name]
    images = made(tmp_path, conversion, tensors)
    image = images.get("t") or images["q"]
    assert image.arrival is not None
    assert image.arriving_bytes == sum(tensor.nbytes for tensor in tensors)
    assert len(image.extents) == len(tensors)


def test_small_pieces_are_extents_as_long_as_they_are_few(tmp_path, monkeypatch):
    conversion, tensors = chain([Chunk(1)], ["a"], ["q", "k"]), [random(5, 8)]
    monkeypatch.setattr(conversions, "_MANY_PIECES", 4)
    assert made(tmp_path, conversion, tensors)["q"].arrival is not None
    monkeypatch.setattr(conversions, "_SMALL_PIECE", 16)
    assert made(tmp_path, conversion, tensors)["q"].arrival is None


def test_tensors_of_several_dtypes_are_cast_before_they_are_joined(tmp_path):
    tensors = [random(3, dtype=torch.bfloat16), random(2), random(5, dtype=torch.float16)]
    checkpoint = opened(tmp_path, {str(i): t for i, t in enumerate(tensors)})
    conversion = chain([Concatenate(0)], ["a", "b", "c"], ["t"])
    image = convert(conversion, [checkpoint.tensors[str(i)] for i in range(3)])["t"]
    checkpoint.tensors["t"] = cast(image, torch.float16)
    wanted = torch.cat([tensor.half() for tensor in tensors])
    assert torch.equal(read_tensor(checkpoint, "t"), wanted)


@pytest.mark.parametrize(
    ("file", "asked"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.int64, torch.int32),
        (torch.float8_e4m3fn, torch.bfloat16),
    ],
)
def test_a_cast_gives_what_torch_gives(tmp_path, file, asked):
    tensor = random(5, 7, dtype=torch.float32 if file.is_floating_point else file).to(file)
    checkpoint = opened(tmp_path, {"t": tensor})
    checkpoint.tensors["t"] = cast(checkpoint.tensors["t"], asked)
    image = checkpoint.tensors["t"]
    assert (image.dtype, image.nbytes, image.arriving_bytes) == (
        asked,
        35 * asked.itemsize,
        35 * file.itemsize,
    )
    assert torch.equal(read_tensor(checkpoint, "t"), tensor.to(asked))


def test_a_cast_of_what_was_moved_is_a_cast_of_its_extents(tmp_path):
    conversion, tensors, _ = MOVES["experts fused with two projections"]
    checkpoint = opened(tmp_path, {str(i): t for i, t in enumerate(tensors)})
    image = convert(conversion, [checkpoint.tensors[str(i)] for i in range(6)])["t"]
    checkpoint.tensors["t"] = cast(image, torch.bfloat16)
    assert checkpoint.tensors["t"].extents == image.extents
    assert torch.equal(read_tensor(checkpoint, "t"), conversion(tensors)["t"].bfloat16())


def test_what_is_made_on_arrival_is_not_assembled_by_hand(tmp_path):
    image = cast(opened(tmp_path, {"t": random(2)}).tensors["t"], torch.float16)
    with pytest.raises(CheckpointError, match="'t' is made when its bytes arrive"):
        assemble("two", [image, image], (2, 2))

"""Checkpoints that the benchmarks run on, and what of them streams."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from wsm_ext import Checkpoint

_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
_PLACE = 256  # device memory is laid out in steps of this

TINY = {"hidden": 256, "intermediate": 704, "heads": 8, "kv_heads": 4, "vocab": 512}


def preset(name: str) -> dict[str, Any]:
    """The shape of one name: "tiny", or one of wsm_ext.hf.synthetic's presets."""
    from wsm_ext.hf.synthetic import PRESETS

    known = {"tiny": TINY, **PRESETS}
    if name not in known:
        raise ValueError(f"no preset {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def ensure_checkpoint(
    folder: Path,
    name: str,
    layers: int,
    shards: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> bool:
    """Writes the checkpoint unless the folder holds it already. True when it was written now."""
    from wsm_ext.hf.synthetic import make_llama_checkpoint

    wanted = {"preset": name, "layers": layers, "dtype": str(dtype), "shards": shards}
    stamp = folder / "bench.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return False
    if folder.is_dir() and any(folder.iterdir()) and not stamp.is_file():
        raise FileExistsError(f"{folder} holds something else; name an empty or new folder")
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    stamp.unlink(missing_ok=True)
    make_llama_checkpoint(folder, layers=layers, dtype=dtype, shards=shards, **preset(name))
    stamp.write_text(json.dumps(wanted))
    return True


def parse_shape(text: str) -> tuple[int, int]:
    """ "8x2048" -> (8, 2048)."""
    batch, _, tokens = text.partition("x")
    if not (batch.isdecimal() and tokens.isdecimal() and int(batch) and int(tokens)):
        raise ValueError(f"a shape is BATCHxTOKENS, not {text!r}")
    return int(batch), int(tokens)


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """ "1x2048,1x1" -> [(1, 2048), (1, 1)]."""
    return [parse_shape(word) for word in text.split(",")]


def is_layer(name: str) -> bool:
    """Whether a tensor, or a unit, lies in a decoder layer: "model.layers.3.mlp" does."""
    return bool(_LAYER.search(name + "."))


def _up(nbytes: int, step: int) -> int:
    return -(-nbytes // step) * step


def blocks(nbytes: int) -> int:
    """Device bytes that one allocation takes, rounded as the planner does."""
    from wsm_ext import _engine

    return int(_engine.device_block_bytes(nbytes))


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint by what they are to the stream; places as laid out on the device."""

    layers: int
    layer_place_bytes: int  # of the largest layer
    layers_bytes: int
    ends_bytes: int  # embedding, last norm, head
    ends_place_bytes: int

    @property
    def model_bytes(self) -> int:
        return self.layers_bytes + self.ends_bytes


def host_bytes(sizes: Sizes, staging: int) -> int:
    """Host memory that keeps the whole model in the cache, beside the staging ring."""
    return sizes.model_bytes + sizes.model_bytes // 64 + (8 << 20) + staging


def measure(tensors: Iterable[tuple[str, int]]) -> Sizes:
    """Sizes from the checkpoint's (name, bytes)."""
    places: dict[int, int] = {}
    layers_bytes = ends_bytes = ends_place = 0
    for name, nbytes in tensors:
        found = _LAYER.search(name)
        if found:
            index = int(found[2])
            places[index] = places.get(index, 0) + _up(nbytes, _PLACE)
            layers_bytes += nbytes
        else:
            ends_bytes += nbytes
            ends_place += _up(nbytes, _PLACE)
    if not places:
        raise ValueError("no tensor of the checkpoint belongs to a layer (…layers.N.…)")
    return Sizes(len(places), max(places.values()), layers_bytes, ends_bytes, ends_place)


def measure_checkpoint(checkpoint: Checkpoint) -> Sizes:
    return measure((name, image.nbytes) for name, image in checkpoint.tensors.items())

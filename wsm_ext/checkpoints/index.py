"""The index of a checkpoint: which file holds which tensor. From a file of unknown origin."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from ..wording import shown
from .files import read_json
from .image import CheckpointError

INDEX_SUFFIX = ".safetensors.index.json"
# As much as the safetensors package reads of a header; the largest indices have some 10 MB.
MAX_INDEX_BYTES = 100_000_000

_LONGEST_PATH = 4096


def read_index(index: Path) -> dict[str, str]:
    """The validated `weight_map`: tensor name to a relative path inside the index's folder."""
    content = read_json(index, "an index", MAX_INDEX_BYTES, "download it again")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no object 'weight_map': it is not a safetensors index")
    if not weight_map:
        raise CheckpointError(f"{index} has an empty 'weight_map': it lists no tensors")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{index}: the file of tensor {shown(name)} is {shown(file)}, not a name"
            )
        problem = _path_problem(file)
        if problem:
            raise CheckpointError(
                f"{index}: the file of tensor {shown(name)}, {shown(file)}, {problem}"
            )
    return weight_map


def _path_problem(file: str) -> str | None:
    """Why an index entry is refused. Lexical: symbolic links may lead anywhere (hub caches)."""
    path = PureWindowsPath(file[:_LONGEST_PATH])  # splits at both kinds of slashes
    if len(file) > _LONGEST_PATH or not file.isprintable() or not path.parts:
        return "is not a file name"  # nor is it shown to a terminal as it is
    if path.anchor:
        return "is absolute: shards lie in the index's folder"
    if ".." in path.parts:
        return "leaves the folder of the index, which is refused"
    if not file.endswith(".safetensors"):
        return "is not a safetensors file: convert the checkpoint to safetensors"
    return None

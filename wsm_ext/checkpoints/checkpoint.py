"""Safetensors checkpoints as byte ranges: tensor images over shards.

Only headers are read. The `safetensors` package decides what a valid file is; since the format
leaves no holes, tensor offsets follow from the order and the sizes of the tensors.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..wording import first_of, shown
from .files import GGUF_ADVICE, absent, is_missing, is_pickle, raise_refused
from .header import read_header
from .image import CheckpointError, TensorImage
from .index import INDEX_SUFFIX, read_index

_MOST_NAMED = 3


@dataclass
class Checkpoint:
    """Tensor images by name, over `shards`: real files, symbolic links resolved.

    `computed`: parameters that no file has, since they can be computed. Their values are in RAM.
    `source`: the file or folder that was opened; None for a list of files.
    """

    shards: list[Path]
    tensors: dict[str, TensorImage]
    metadata: dict[str, str] = field(default_factory=dict)
    computed: dict[str, torch.Tensor] = field(default_factory=dict)
    source: Path | None = None

    @classmethod
    def open(cls, source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Checkpoint:
        """Read the headers of one file, a folder, an index file, or a list of files."""
        if not isinstance(source, (str, os.PathLike)):
            return cls._of_files([Path(path) for path in source])
        if not os.fspath(source):
            raise CheckpointError("the checkpoint's path is empty: give a file or a folder")
        path = Path(source)
        chosen = _choose(path) if os.path.isdir(path) else [path]
        if len(chosen) == 1 and chosen[0].name.endswith(INDEX_SUFFIX):
            return replace(cls._of_index(chosen[0]), source=path)
        return replace(cls._of_files(chosen), source=path)

    def stored(self) -> list[list[TensorImage]]:
        """By shard: every tensor as the file has it, in its order. Reads the headers again."""
        return [read_header(file, shard)[0] for shard, file in enumerate(self.shards)]

    @classmethod
    def _of_files(cls, files: list[Path]) -> Checkpoint:
        if not files:
            raise CheckpointError("the list of files is empty: give at least one safetensors file")
        checkpoint = cls([], {})
        origin: dict[str, Path] = {}
        for file in files:
            for image in checkpoint._add(file):
                if image.name in origin:
                    raise CheckpointError(
                        f"tensor {shown(image.name)} is in {origin[image.name]} and in {file};"
                        " give the files of one checkpoint, each once"
                    )
                origin[image.name] = file
                checkpoint.tensors[image.name] = image
        return checkpoint

    @classmethod
    def _of_index(cls, index: Path) -> Checkpoint:
        weight_map = read_index(index)
        names_in: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            names_in.setdefault(file, []).append(name)
        checkpoint = cls([], {})
        unlisted: list[str] = []
        for file, names in names_in.items():
            shard = index.parent / file
            if is_missing(shard):
                raise CheckpointError(
                    f"{absent(shard)}: {index} places {_listed(names)} there; download it again"
                )
            images = {image.name: image for image in checkpoint._add(shard)}
            lacking = [name for name in names if name not in images]
            if lacking:
                raise CheckpointError(
                    f"{shard} has no tensor {_listed(lacking)}, but {index} says so; the index and"
                    " the shards are not of one checkpoint: download both again"
                )
            unlisted += [name for name in images if name not in weight_map]
            checkpoint.tensors.update((name, images[name]) for name in names)
        if unlisted:
            warnings.warn(
                f"{index} does not list {len(unlisted)} tensors that its shards have; they are"
                f" left out: {_listed(unlisted)}",
                stacklevel=3,
            )
        return checkpoint

    def _add(self, file: Path) -> list[TensorImage]:
        """Append a shard; its images in file order."""
        images, metadata = read_header(file, len(self.shards))
        self.shards.append(file.resolve())
        for key, value in metadata.items():
            self.metadata.setdefault(key, value)
        return images


def _choose(folder: Path) -> list[Path]:
    """The folder's checkpoint: its index alone, or all of its files."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise_refused(folder, error)
        raise CheckpointError(f"{folder} cannot be listed: {error}") from error
    files = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if "model.safetensors" in files:  # goes before an index, as in transformers
        unused = [name for name in files + indices if name != "model.safetensors"]
        if unused:
            warnings.warn(
                f"{folder}: model.safetensors is used, {_listed(unused)} not; to use others, give"
                " the index or a list of files",
                stacklevel=3,
            )
        return [folder / "model.safetensors"]
    if "model" + INDEX_SUFFIX in indices:
        return [folder / ("model" + INDEX_SUFFIX)]
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder} has several indices: {_listed(indices)}; give the one that is meant"
        )
    chosen = indices or files
    if not chosen:
        ggufs = [name for name in names if name.endswith(".gguf")]
        if ggufs:
            raise CheckpointError(f"{folder} has GGUF files only ({_listed(ggufs)}){GGUF_ADVICE}")
        pickles = [name for name in names if is_pickle(name)]
        advice = f"convert {_listed(pickles)} to safetensors" if pickles else "check the path"
        raise CheckpointError(f"{folder} has no *.safetensors file; {advice}")
    return [folder / name for name in chosen]


def _listed(names: Iterable[str]) -> str:
    return first_of([shown(name) for name in sorted(names)], _MOST_NAMED)

"""A part of a checkpoint: a model whose tensors lie under another prefix in the file.

The class of a text model is given the checkpoint of a larger one. If their base prefixes differ,
transformers finds no name and makes up all weights; here the prefix is looked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from transformers import PreTrainedModel

from ..checkpoints.checkpoint import Checkpoint


def under_names_of_part(model: PreTrainedModel, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the names of the part that is the model; as it is, if no one prefix has
    most of them."""
    names = list(model.state_dict())
    base = f"{model.base_model_prefix}."
    if not any(name.startswith(base) for name in names):  # it is a base model itself
        base = ""
    inside = {name.removeprefix(base) for name in names if name.startswith(base)}
    counted = Counter(_prefixes(inside, checkpoint.tensors)).most_common(2)
    if not counted or (len(counted) == 2 and counted[0][1] == counted[1][1]):
        return checkpoint
    prefix = counted[0][0]
    name_of = {key: base + key.removeprefix(prefix) for key in checkpoint.tensors
               if key.startswith(prefix)}  # fmt: skip
    for name in names:
        if not name.startswith(base):  # beside the base: a head, say
            ending = [key for key in checkpoint.tensors if key.endswith(f".{name}")]
            name_of |= {key: name for key in ending if len(ending) == 1}
    renamed = {name_of.get(key, key): image for key, image in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=renamed)


def _prefixes(names: set[str], keys: Iterable[str]) -> Iterator[str]:
    """What stands before one of the names, key by key."""
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts)):
            if ".".join(parts[count:]) in names:
                yield ".".join(parts[:count]) + "."
                break

"""The tensors in what a forward takes and gives, whatever they are wrapped in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

_DEEPEST = 4  # objects within objects


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers, and in the attributes of other objects (dataclasses)."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif _opaque(leaf) and depth < _DEEPEST:
            yield from tensors_in(vars(leaf), depth + 1)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any, depth: int = 0) -> Any:
    """The same with every tensor changed. Containers are new, other objects are altered."""

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return change(leaf)
        if _opaque(leaf) and depth < _DEEPEST:
            for key, held in list(vars(leaf).items()):
                changed = map_tensors(change, held, depth + 1)
                if changed is not held and any(True for _ in tensors_in(held, depth + 1)):
                    object.__setattr__(leaf, key, changed)
        return leaf

    return tree_map(visit, value)


def addresses_of(tensor: torch.Tensor) -> Iterator[int]:
    """Where the tensor's elements begin: of one without a storage of its own, those of the tensors
    that it is made of."""
    inner = list(_inner_tensors(tensor))
    if not inner:
        yield tensor.data_ptr()
    for part in inner:
        yield from addresses_of(part)


def _inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a tensor of functorch, a sparse one or a wrapper is made of; nothing of a plain one."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        yield torch._C._functorch.get_unwrapped(tensor)
    elif is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        yield from (getattr(tensor, name) for name in names)
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.is_nested:
        yield tensor.values()


def _opaque(leaf: Any) -> bool:
    return (
        hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and not callable(leaf)
    )

"""The forwards of a streamed module: acquire, run, release, and what a backward will need of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from .. import _engine
from ..modules.dynamo import between_graphs, break_graph, never_compiled
from ..modules.tensor_tree import tensors_in
from .seam import out_of_memory
from .wrappers import remember


class Owner(Protocol):
    """Whose the units are."""

    def own(self, values: Any) -> Any:
        """The values, with copies of those that lie in the arena."""

    def check_frozen(self, names: Iterable[str] | None = None) -> None:
        """Raise where a parameter of the base is to be trained."""

    def before_pass(self) -> None:
        """Raise where a pass may not begin."""


def wrap_unit(
    module: nn.Module,
    index: int,
    names: list[str],
    seam: _engine.Seam,
    owner: Owner,
    replacements: _engine.Replacements,
) -> None:
    """The module's forward runs while its unit `index` is on the device."""
    forward = _forward_of(module)

    def loaded(*args: Any, **kwargs: Any) -> Any:
        break_graph()
        if seam.dissolved:  # somebody kept this beyond the end
            return forward(*args, **kwargs)
        if not seam.depth:
            owner.before_pass()
        with seam.unit(index):
            if not torch.is_grad_enabled():
                return owner.own(forward(*args, **kwargs))
            owner.check_frozen(names)
            known = _nodes_of((args, kwargs))
            result = owner.own(forward(*args, **kwargs))
            if torch.is_grad_enabled():
                made = _nodes_of((result, args, kwargs))
                _expect(seam, made.keys() - known.keys())
            return result

    _wrap(module, between_graphs(loaded), replacements)


def wrap_ancestors(
    root: nn.Module,
    holders: set[int],
    seam: _engine.Seam,
    owner: Owner,
    replacements: _engine.Replacements,
) -> None:
    """The forwards of all modules around the `holders` (ids of units' modules) are a pass."""
    for outer in root.modules():
        if id(outer) in holders or isinstance(outer, (nn.ModuleList, nn.ModuleDict)):
            continue
        if any(id(inner) in holders for inner in outer.modules()):
            _wrap(outer, _within_pass(_forward_of(outer), seam, owner), replacements)


def _within_pass(
    forward: Callable[..., Any], seam: _engine.Seam, owner: Owner
) -> Callable[..., Any]:
    def entered(*args: Any, **kwargs: Any) -> Any:
        break_graph()
        if seam.dissolved:
            return forward(*args, **kwargs)
        if not seam.depth:
            owner.before_pass()
        with seam.pass_scope():
            try:
                return forward(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                if seam.depth == 1:
                    raise out_of_memory(error) from error
                raise

    return between_graphs(entered)


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """What the module itself runs: what stands on the instance now, else its class's at each call,
    which somebody may patch meanwhile."""
    own = module.__dict__.get("forward")
    if own is not None:
        return own  # type: ignore[no-any-return]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)

    return between_graphs(forward)


def _wrap(
    module: nn.Module, forward: Callable[..., Any], replacements: _engine.Replacements
) -> None:
    functools.update_wrapper(forward, module.forward)
    remember(forward, module.__dict__.get("forward"))
    replacements.put(module.__dict__, "forward", forward)


# -- for the backward ------------------------------------------------------------------------------


@never_compiled
def _nodes_of(values: Any) -> dict[Any, None]:
    """The nodes that made these tensors, and those that they are views of."""
    nodes: dict[Any, None] = {}
    for tensor in tensors_in(values):
        if not tensor.requires_grad:
            continue
        base = tensor._base
        for node in (tensor.grad_fn, None if base is None else base.grad_fn):
            if node is not None:
                nodes[node] = None
    return nodes


@never_compiled
def _expect(seam: _engine.Seam, nodes: Iterable[Any]) -> None:
    """Before any of the nodes runs, the units whose forwards run now are acquired again."""
    chain = list(dict.fromkeys(seam.active))
    for node in nodes:
        # Where a unit gives what a unit inside it gave, the inner one's chain is the longer.
        if seam not in node.metadata:
            node.metadata[seam] = True
            node.register_prehook(seam.hook_of(chain))

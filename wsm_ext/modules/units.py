"""Which parameters are loaded and released together: the units of a module.

A set of modules, the roots, is chosen by the mode. A parameter belongs to the nearest root on the
path from the top of the module to the module that owns it. So every entry is in exactly one unit,
and a unit inside another is carved out of it.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

_MODES = ("auto", "layer", "group", "leaf")

# Their forwards read the weights of their children without calling them.
_READ_THEIR_CHILDREN = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class ParameterEntry:
    """One entry of `owner._parameters`. A tied parameter has an entry in each of its owners."""

    name: str
    owner: nn.Module
    key: str


@dataclass
class Unit:
    """What is loaded and released together, around the forward of `module`."""

    name: str
    module: nn.Module
    label: str
    entries: list[ParameterEntry]
    # Units lie inside the module: this one stays acquired while they run.
    encloses_units: bool
    # The index of the layer that it is or lies in, and the name of the stack that holds this layer.
    layer: int | None
    stack: str | None = None


@dataclass(eq=False)
class _Node:
    """A module at the first place where registration order meets it."""

    module: nn.Module
    name: str
    parent: _Node | None
    children: list[_Node] = field(default_factory=list)
    # All of its children, those too that were met elsewhere before.
    edges: list[_Node] = field(default_factory=list)
    # Set on a layer: the qualified name of its stack, and its index there.
    stack: str | None = None
    index: int | None = None
    holds_parameters: bool = False

    @property
    def owns_parameters(self) -> bool:
        return any(p is not None for p in self.module._parameters.values())

    @property
    def runs(self) -> bool:
        """Has a forward, which is what a unit is loaded and released around."""
        return (
            type(self.module).forward is not nn.Module.forward or "forward" in self.module.__dict__
        )


def find_units(module: nn.Module, units: str | Sequence[str] = "auto") -> list[Unit]:
    """The units of `module`, in registration order.

    "layer" (and "auto"): each layer of a stack whole, the rest by owner. "group": each child of a
    layer whole. "leaf": each module that owns parameters. A list of names: those modules whole, the
    rest by owner. Errors name what has no forward to load it at.
    """
    if isinstance(units, str) and units not in _MODES:
        raise ValueError(
            f"units must be one of {', '.join(map(repr, _MODES))} or a list of module names,"
            f" not {units!r}"
        )
    nodes = _build(module)
    top = nodes[id(module)]
    _find_stacks(top)
    roots: list[_Node] = []
    if not isinstance(units, str):
        named = [_named(module, nodes, name) for name in units]
        roots += named
        _choose_owners(top, roots, named)
    elif units == "leaf":
        _choose_owners(top, roots, [])
    else:
        _choose(top, roots, _choose_groups if units == "group" else _choose_whole)
    root_of = _assign(top, {id(root) for root in roots})
    return _make_units(list(nodes.values()), root_of, grouped=units == "group")


def _build(module: nn.Module) -> dict[int, _Node]:
    nodes: dict[int, _Node] = {}

    def visit(module: nn.Module, name: str, parent: _Node | None) -> _Node:
        if id(module) in nodes:
            return nodes[id(module)]
        node = nodes[id(module)] = _Node(module, name, parent)
        for key, child in module._modules.items():
            if child is None:
                continue
            first = id(child) not in nodes
            below = visit(child, f"{name}.{key}" if name else key, node)
            node.edges.append(below)
            if first:
                node.children.append(below)
        node.holds_parameters = node.owns_parameters or any(c.holds_parameters for c in node.edges)
        return node

    visit(module, "", None)
    return nodes


# Stacks of layers


def _find_stacks(node: _Node) -> None:
    """Mark the layers of the outermost stacks."""
    layers = _layers(node)
    for child in node.children:
        if id(child) in layers:
            child.stack, child.index = node.name, layers[id(child)]
        else:
            _find_stacks(child)


def _layers(node: _Node) -> dict[int, int]:
    """The index of each child that is a layer, if the node is a stack."""
    index_of: dict[int, int] = {}
    for index, child in enumerate(node.edges):
        index_of.setdefault(id(child), index)
    layers = [child for child in node.children if child.holds_parameters]
    if isinstance(node.module, nn.ModuleList):
        # A few classes that alternate are alike too: attention and Mamba layers of one decoder.
        classes = {type(child.module) for child in layers}
        if len(classes) > 1 and len(layers) < 3 * len(classes):
            return {}
    elif isinstance(node.module, nn.Sequential):
        layers = [c for c in layers if c.edges and not isinstance(c.module, _CONTAINERS)]
        count = Counter(type(child.module) for child in layers)
        layers = [child for child in layers if count[type(child.module)] >= 2]
    else:
        return {}
    return {id(child): index_of[id(child)] for child in layers}


# Roots


def _choose(
    node: _Node, roots: list[_Node], choose_layer: Callable[[_Node, list[_Node]], None]
) -> None:
    """Layers as `choose_layer` does, all else by owner."""
    if node.stack is not None:
        choose_layer(node, roots)
        return
    if _add_owner(node, roots):
        return
    for child in node.children:
        _choose(child, roots, choose_layer)


def _choose_owners(node: _Node, roots: list[_Node], whole: list[_Node]) -> None:
    if node in whole or _add_owner(node, roots):
        return
    for child in node.children:
        _choose_owners(child, roots, whole)


def _choose_whole(node: _Node, roots: list[_Node]) -> None:
    if node.runs:
        roots.append(node)
        return
    # A layer that is a bare list of modules: what it lists runs.
    _add_owner(node, roots)
    for child in node.children:
        _choose_whole(child, roots)


def _choose_groups(node: _Node, roots: list[_Node]) -> None:
    if not _add_owner(node, roots):
        for child in node.children:
            _choose_whole(child, roots)


def _add_owner(node: _Node, roots: list[_Node]) -> bool:
    """Make the node a root for its direct parameters; True if it takes its children's too."""
    if isinstance(node.module, _READ_THEIR_CHILDREN):
        roots.append(node)
        return True
    if node.owns_parameters:
        runner: _Node | None = node
        while runner is not None and not runner.runs:
            runner = runner.parent
        if runner is None:
            key = next(k for k, p in node.module._parameters.items() if p is not None)
            raise ValueError(
                f"parameter {_join(node.name, key)!r} has no module above it with a forward, so"
                " nothing says when it is used; stream the module that uses it"
            )
        roots.append(runner)
    return False


def _named(module: nn.Module, nodes: dict[int, _Node], name: str) -> _Node:
    try:
        node = nodes[id(module.get_submodule(name))]
    except AttributeError:
        close = difflib.get_close_matches(name, [n.name for n in nodes.values() if n.name])
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"units: the model has no module {name!r}{hint}") from None
    if not node.holds_parameters:
        raise ValueError(f"units: module {name!r} has no parameters; leave it out")
    if not node.runs:
        inner = [child.name for child in node.children if child.holds_parameters]
        raise ValueError(
            f"units: module {name!r} ({type(node.module).__name__}) has no forward to load it at;"
            f" name what it holds: {', '.join(map(repr, inner[:3]))}"
        )
    return node


# Which root a module's parameters belong to


def _assign(top: _Node, chosen: set[int]) -> dict[int, _Node | None]:
    """The root of each module. One that is used inside several becomes a root of its own: whichever
    runs it, it is loaded."""
    while True:
        roots_of = _nearest_roots(top, chosen)
        shared = _shared(top, roots_of)
        if not shared:
            return {key: roots[0] for key, roots in roots_of.items()}
        chosen = chosen | shared


def _nearest_roots(top: _Node, chosen: set[int]) -> dict[int, list[_Node | None]]:
    """The nearest roots of each module on all paths to it, the first path first."""
    roots_of: dict[int, list[_Node | None]] = {}

    def visit(node: _Node, root: _Node | None) -> None:
        if id(node) in chosen:
            root = node
        roots = roots_of.setdefault(id(node), [])
        if root not in roots:
            roots.append(root)
            for child in node.edges:
                visit(child, root)

    visit(top, None)
    return roots_of


def _shared(top: _Node, roots_of: dict[int, list[_Node | None]]) -> set[int]:
    """The outermost modules that several roots use."""
    shared: set[int] = set()

    def visit(node: _Node) -> None:
        if len(roots_of[id(node)]) > 1 and node.runs and node.holds_parameters:
            shared.add(id(node))
            return
        for child in node.children:
            visit(child)

    visit(top)
    return shared


# Units


def _make_units(nodes: list[_Node], root_of: dict[int, _Node | None], grouped: bool) -> list[Unit]:
    entries: dict[int, list[ParameterEntry]] = {}
    for node in nodes:
        for key, parameter in node.module._parameters.items():
            if parameter is not None:
                root = root_of[id(node)]
                entry = ParameterEntry(_join(node.name, key), node.module, key)
                entries.setdefault(id(root), []).append(entry)
    several = len({node.stack for node in nodes if node.stack is not None}) > 1
    labels: set[str] = set()
    units: list[Unit] = []
    for node in nodes:
        if id(node) not in entries:
            continue
        label = _label(node, several, grouped, labels)
        labels.add(label)
        units.append(
            Unit(
                node.name,
                node.module,
                label,
                entries[id(node)],
                encloses_units=any(id(other) in entries for other in _below(node)),
                layer=_layer_of(node).index,
                stack=_layer_of(node).stack,
            )
        )
    return units


def _below(node: _Node) -> Iterator[_Node]:
    """All modules inside, by whatever path, each once."""
    seen = {id(node)}
    waiting = list(node.edges)
    while waiting:
        child = waiting.pop()
        if id(child) not in seen:
            seen.add(id(child))
            yield child
            waiting += child.edges


def _layer_of(node: _Node) -> _Node:
    """The layer that the node is or lies in; the top if there is none."""
    while node.stack is None and node.parent is not None:
        node = node.parent
    return node


def _label(node: _Node, several: bool, grouped: bool, labels: set[str]) -> str:
    """As in log lines: `layer=6`, `layer=6 group=attn`, `layer=6 unit=mlp.up`, `unit=lm_head`.

    A bare index would be ambiguous if there are several stacks: `unit=encoder.layers.6`.
    """
    layer = _layer_of(node)
    if layer.index is None or (several and not grouped):
        return f"unit={node.name or type(node.module).__name__}"
    prefix = f"unit={layer.name}" if several else f"layer={layer.index}"
    if node is layer:
        return prefix
    inner = node.name[len(layer.name) + 1 :]
    if not grouped:
        return f"{prefix} unit={inner}"
    label = f"{prefix} group={_group(inner)}"
    return label if label not in labels else f"{prefix} group={inner}"


def _group(name: str) -> str:
    lowered = name.lower()
    if re.search(r"norm|(^|_)ln(_|\d|$)", lowered):  # post_attention_layernorm is not attention
        return name
    if "attn" in lowered or "attention" in lowered:
        return "attn"
    if any(word in lowered for word in ("mlp", "ffn", "feed_forward", "feedforward", "moe")):
        return "mlp"
    return name


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name

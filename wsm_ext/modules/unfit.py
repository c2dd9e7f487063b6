"""Modules that cannot be streamed, since something else runs or moves their weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

# By class name: whoever has put them there has imported the package, and nobody else needs it.
_ACCELERATE = ("AlignDevicesHook", "CpuOffload", "UserCpuOffloadHook", "LayerwiseCastingHook")
_DIFFUSERS = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting")


def refuse_unfit(module: nn.Module) -> None:
    """Raises ValueError naming the module in it, and what to do."""
    for name, inner in module.named_modules():
        reason = _unfit(inner)
        if reason is not None:
            what = f"module {name!r}" if name else f"the module ({type(inner).__name__})"
            raise ValueError(f"{what} {reason}")


def _unfit(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        if [*module.parameters(), *module.buffers()]:
            return "was compiled by torch.jit, which lets nothing in between: stream the Python one"
        return None
    attributes = vars(module)
    for hook in _parts(attributes.get("_hf_hook")):
        kind = next(
            (base.__name__ for base in type(hook).__mro__ if base.__name__ in _ACCELERATE), ""
        )
        if kind:
            return (
                f"has a hook of accelerate ({kind}), which loads or moves its weights at each"
                " forward: load it without device_map and offloading, or call"
                " accelerate.hooks.remove_hook_from_submodules(module) first"
            )
    registry = attributes.get("_diffusers_hook")
    for name in _DIFFUSERS:
        if registry is not None and name in registry.hooks:
            return (
                f"has a hook of diffusers ({name}), which moves or casts its weights at each"
                f" forward: call module._diffusers_hook.remove_hook({name!r}, recurse=True) first"
            )
    return None


def _parts(hook: object) -> Iterator[object]:
    """The hook, or those that it runs one after another."""
    if hook is not None:
        yield hook
        for inner in getattr(hook, "hooks", ()):
            yield from _parts(inner)

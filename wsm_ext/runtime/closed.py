"""What is left on a module whose stream was closed and whose parameters are on meta again."""

from __future__ import annotations

from typing import Any

from torch import nn


class ClosedStream:
    """A pre-hook of forwards: a clear error in place of meta tensors.

    It goes away when the module has weights again: loaded, or streamed.
    """

    def __init__(self, where: str) -> None:
        self._where = where

    def __call__(self, module: nn.Module, args: Any) -> None:
        if any(parameter.is_meta for parameter in module.parameters()):
            raise RuntimeError(
                f"the stream of this module was closed, and its weights are in {self._where}: its"
                " parameters are on meta, as they were before stream(). Stream it again, or load"
                " weights into it with load_state_dict(..., assign=True)"
            )
        allow_forward(module)


def on_meta(module: nn.Module) -> list[nn.Module]:
    """The modules that have a parameter on meta themselves, and this one; none if there is none."""
    owners = [
        inner
        for inner in module.modules()
        if any(p is not None and p.is_meta for p in inner._parameters.values())
    ]
    return list(dict.fromkeys([module, *owners])) if owners else []


def refuse_forward(module: nn.Module, where: str) -> None:
    module.register_forward_pre_hook(ClosedStream(where))


def allow_forward(module: nn.Module) -> None:
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, ClosedStream)]:
        hooks.pop(key, None)

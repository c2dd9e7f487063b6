"""What torch.compile must leave alone: it may compile what runs between loads, not the loads.

The marks lie on code objects. So they need no import of torch._dynamo, which takes seconds, and
hold for whatever is compiled later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")

_WHY = (
    "wsm_ext loads and releases weights around this forward, which no graph can contain; compile"
    " without fullgraph=True"
)


def between_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Is not compiled; what it calls may be."""
    _mark(function, recursive=False)
    return function


def never_compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Is not compiled, nor is what it calls."""
    _mark(function, recursive=True)
    return function


def break_graph() -> None:
    """Called first in what is between graphs: Dynamo, when it traces that, is told why not."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(msg=_WHY)


def _mark(function: Callable[..., object], recursive: bool) -> None:
    code = function.__code__
    frames = torch._C._dynamo.eval_frame
    try:
        action = frames._FrameAction
        inner = action.SKIP if recursive else action.DEFAULT
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(action.SKIP, inner))
    except AttributeError:  # an older torch
        from torch._dynamo.eval_frame import skip_code

        skip_code(code)

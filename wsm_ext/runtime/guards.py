"""What a streamed module refuses: guards on it, and on all that lies in it and holds weights.

Each guard stands in a module's `__dict__`, before the method of its class, and calls that where
nothing speaks against it. What is refused is refused before anything is changed or written, and
whatever the budgets are.

    to, half, cuda, ...              refused if a weight would change
    load_state_dict                  refused if a weight would be written: adapters are loaded
    pickle, torch.save               refused
    copy.deepcopy                    refused for all of it; a module inside is copied (copies.py)
    save_pretrained, push_to_hub     refused, but for adapters alone
    resize_token_embeddings          refused if the size would change
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import _engine
from .copies import resident_copy


class Base(Protocol):
    """Whose weights are guarded."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def where(self) -> str:
        """Where the weights are, for messages."""

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter is one of the streamed base."""

    def fetch(self, name: str) -> torch.Tensor:
        """A copy of a parameter on the device."""


# A guard is called with the module, what stood in its `__dict__` before, and the arguments.
Guard = Callable[..., Any]


class Guards:
    """Put in place by the constructor, taken away by `remove`."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._replacements = _engine.Replacements()
        try:
            for inner in base.module.modules():
                if any(map(base.holds, inner.parameters())):
                    for name, guard in self._guards_of(inner):
                        placed = partial(guard, inner, inner.__dict__.get(name))
                        self._replacements.put(inner.__dict__, name, placed)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """What a user has set in their place stays."""
        self._replacements.undo()

    def refuse_copy(self) -> NoReturn:
        raise TypeError(
            "a streamed module cannot be copied or pickled: its weights are in"
            f" {self._base.where}. Do it before stream(), or after close(); or stream a second"
            " module, in another process too"
        )

    def _guards_of(self, inner: nn.Module) -> Iterator[tuple[str, Guard]]:
        yield "_apply", self._apply
        yield "load_state_dict", self._load_state_dict
        yield "_load_from_state_dict", self._load_from_state_dict
        yield "__reduce_ex__", self._reduce
        yield "__deepcopy__", self._deepcopy
        for name, guard in (
            ("save_pretrained", self._save_pretrained),
            ("push_to_hub", self._push_to_hub),
            ("resize_token_embeddings", self._resize_token_embeddings),
        ):
            if hasattr(type(inner), name):
                yield name, guard

    # -- conversions -------------------------------------------------------------------------------

    @torch.inference_mode(False)  # inside it, even to() where it changes nothing asks
    def _apply(
        self, inner: nn.Module, before: Guard | None, fn: Callable[..., Any], recurse: bool = True
    ) -> Any:
        for name, parameter in inner.named_parameters(recurse=recurse):
            if self._base.holds(parameter) and not _same(fn, parameter):
                raise RuntimeError(
                    f"{name!r} is part of a streamed module: its dtype and device were settled by"
                    " stream() and cannot be changed by to(), half(), cuda() and the like. close()"
                    " the streamed module, and stream it again with the dtype and device you want"
                )
        return _pass_on(inner, "_apply", before)(fn, recurse)

    # -- state dicts -------------------------------------------------------------------------------

    def _load_state_dict(
        self, inner: nn.Module, before: Guard | None, state_dict: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._check_load(inner.named_parameters(remove_duplicate=False), state_dict)
        return _pass_on(inner, "load_state_dict", before)(state_dict, *args, **kwargs)

    def _load_from_state_dict(
        self, inner: nn.Module, before: Guard | None, state_dict: Any, prefix: str, *args: Any
    ) -> Any:
        own = inner.named_parameters(prefix[:-1], recurse=False, remove_duplicate=False)
        self._check_load(own, state_dict)
        return _pass_on(inner, "_load_from_state_dict", before)(state_dict, prefix, *args)

    def _check_load(self, parameters: Iterable[tuple[str, nn.Parameter]], state_dict: Any) -> None:
        for name, parameter in parameters:
            if name in state_dict and self._base.holds(parameter):
                raise RuntimeError(
                    f"load_state_dict() would write {name!r}, a weight of a streamed module: its"
                    f" weights are in {self._base.where}. For adapters, give their keys alone, and"
                    " strict=False. For other weights, close() the streamed module, and stream it"
                    " from a checkpoint that has them"
                )

    # -- copies and files --------------------------------------------------------------------------

    def _reduce(self, inner: nn.Module, before: Guard | None, protocol: object) -> NoReturn:
        self.refuse_copy()

    def _deepcopy(self, inner: nn.Module, before: Guard | None, memo: dict[Any, Any]) -> Any:
        if inner is self._base.module:
            self.refuse_copy()
        guards = {
            name: value.args[1]
            for name, value in inner.__dict__.items()
            if isinstance(value, partial) and getattr(value.func, "__self__", None) is self
        }
        return resident_copy(inner, guards, self._base.fetch, memo)

    def _save_pretrained(
        self, inner: nn.Module, before: Guard | None, *args: Any, **kwargs: Any
    ) -> Any:
        self._check_save(inner, "save_pretrained")
        return _pass_on(inner, "save_pretrained", before)(*args, **kwargs)

    def _push_to_hub(
        self, inner: nn.Module, before: Guard | None, *args: Any, **kwargs: Any
    ) -> Any:
        self._check_save(inner, "push_to_hub")
        return _pass_on(inner, "push_to_hub", before)(*args, **kwargs)

    def _check_save(self, inner: nn.Module, name: str) -> None:
        if not getattr(inner, "_hf_peft_config_loaded", False):  # then it saves adapters alone
            raise RuntimeError(
                f"{name}() is for a module with its weights in memory; those of a streamed one are"
                f" in {self._base.where}. Copy them from there, or close() it and load them first"
            )

    def _resize_token_embeddings(
        self, inner: nn.Module, before: Guard | None, *args: Any, **kwargs: Any
    ) -> Any:
        wanted = args[0] if args else kwargs.get("new_num_tokens")
        table: Any = inner.get_input_embeddings()  # type: ignore[operator]
        multiple = kwargs.get("pad_to_multiple_of") or (args[1] if len(args) > 1 else None)
        if multiple is not None or wanted not in (None, table.weight.shape[0]):
            raise RuntimeError(
                f"resize_token_embeddings({wanted}) would change weights of a streamed module: its"
                f" weights are in {self._base.where}. Resize the resident model, save it, and"
                " stream that"
            )
        return _pass_on(inner, "resize_token_embeddings", before)(*args, **kwargs)


def _pass_on(inner: nn.Module, name: str, before: Guard | None) -> Guard:
    """What the module would do without a guard."""
    return before if before is not None else partial(getattr(type(inner), name), inner)


class _ReadOnly(TorchFunctionMode):
    """Raises RuntimeError before an operation that would write, as those with a trailing _ do."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            raise RuntimeError(f"{name} would write")
        return func(*args, **(kwargs or {}))


def _same(fn: Callable[..., Any], parameter: torch.Tensor) -> bool:
    """Whether a conversion leaves the parameter as it is."""
    try:
        with _ReadOnly():
            return fn(parameter) is parameter
    except RuntimeError:
        return False

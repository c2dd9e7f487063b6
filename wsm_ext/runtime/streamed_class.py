"""The class of a streamed module: its own class, and `StreamedModule` as well.

`stream()` changes the class of the module in place, and `close()` changes it back:

    class LlamaForCausalLM(NoRegistry, LlamaForCausalLM, StreamedModule): ...

- It has the name, the qualified name and the module of the original: transformers keeps registries
  by `str(model.__class__)`.
- `NoRegistry` comes first: classes that register their subclasses, or want keywords of them, never
  hear of it. Nor do metaclasses: `type.__new__` makes it.
- `StreamedModule` comes last, so the module's own class wins. Each name of the handle (`plan`,
  `fetch`, ...) gives way to what the module has of that name, now or later.
- To make one makes an original. So `layers[:2]` of a streamed ModuleList is a plain one.

What is known of the stream lies in the module's `__dict__`, under KEY: some modules do not let
attributes be set.
"""

from __future__ import annotations

import abc
import inspect
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.nn import Module as _Module

    from ..planning.plan import PlanSummary
    from .handle import StreamHandle
else:
    _Module = object  # a module is one by the class beside it, which may be nn.Module itself

KEY = "_wsm_streamed"

# What the handle lends to the module. Those of one line come together, or not at all.
_NAMES = (
    *(("plan",), ("stats",), ("expect",), ("fetch",), ("trace",)),
    *(("resize",), ("shrink",), ("close",)),
    ("__enter__", "__exit__"),
)

# By original class and names: alive as long as a module is of it.
_derived: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


class StreamedModule(_Module):
    """A module whose weights stream: what `stream()` and `from_pretrained()` return.

    It is the module that was given, of its own class and of this one. What is listed here is found
    on it, unless it has something of that name itself: `wsm_ext.handle(module)` has all of it.
    """

    if TYPE_CHECKING:

        @property
        def plan(self) -> PlanSummary: ...
        def stats(self) -> dict[str, Any]: ...
        def expect(self, sequences: int, tokens: int) -> None: ...
        def fetch(self, name: str) -> torch.Tensor: ...
        def trace(
            self, path: str | os.PathLike[str], *, most_events: int | None = None
        ) -> AbstractContextManager[None]: ...
        def resize(
            self,
            *,
            device_memory: int | str | None = None,
            host_memory: int | str | None = None,
            progress: Callable[[int, int], None] | None = None,
        ) -> None: ...
        def shrink(self, nbytes: int | str) -> None: ...
        def close(self) -> None: ...
        def __enter__(self) -> StreamedModule: ...
        def __exit__(self, *_: object) -> None: ...
        def __getattr__(self, name: str) -> Any: ...


class NoRegistry:
    """First among the bases: the others are not told of their subclass."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


class _Lent:
    """A name of the handle, found on the module. What the module registers later comes first."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        held = module.__dict__
        for kind in ("_parameters", "_buffers", "_modules"):
            if self._name in held.get(kind, ()):
                return held[kind][self._name]
        lender = held.get(KEY)
        if lender is None:  # it was closed while this was looked up
            raise RuntimeError("the streamed module is closed")
        return getattr(lender, self._name)


def handle(module: nn.Module) -> StreamHandle:
    """The handle of a streamed module: `plan`, `stats()`, `close()` and so on, whatever names the
    module itself has. It goes on to tell the last figures after `close()`.

    Raises ValueError if the module is not streamed.
    """
    found: StreamHandle | None = getattr(module, "__dict__", {}).get(KEY)
    if found is not None:
        return found
    inside = [name for name, inner in _modules_of(module) if KEY in inner.__dict__]
    hint = f": give its module {inside[0]!r}, which is" if inside else ""
    raise ValueError(f"this {type(module).__name__} is not streamed{hint}")


def _modules_of(module: Any) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules()) if isinstance(module, nn.Module) else []


def enter_class(module: nn.Module) -> bool:
    """Make the module a StreamedModule. False if its class cannot be changed: then only its handle
    has what the class would."""
    cls = type(module)
    names = [name for group in _NAMES if not _has_any(module, group) for name in group]
    try:
        derived = _derived.get((cls, *names)) or _derive(cls, names)
        object.__setattr__(module, "__class__", derived)
    except (TypeError, AttributeError):
        return False
    return True


def leave_class(module: nn.Module) -> None:
    """Give the module its own class back."""
    derived = type(module)
    if "_wsm_original" in derived.__dict__:
        object.__setattr__(module, "__class__", derived.__dict__["_wsm_original"])


def class_on_top(module: nn.Module) -> type | None:
    """The class that somebody has set on top of the streamed one; None if nobody has."""
    cls = type(module)
    covered = any("_wsm_original" in base.__dict__ for base in cls.__mro__[1:])
    return cls if covered else None


def _has_any(module: nn.Module, names: tuple[str, ...]) -> bool:
    for name in names:
        if inspect.getattr_static(module, name, None) is not None:
            return True
        try:
            if hasattr(module, name):  # children and the like, by __getattr__
                return True
        except Exception:  # it has something there
            return True
    return False


def _derive(cls: type[nn.Module], names: list[str]) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__new__": _maker_of(cls),
        "__call__": _call_of(cls),
        "__copy__": _refuse_copy,
        "_wsm_original": cls,
        **{name: _Lent(name) for name in names},
    }
    metaclass = type(cls)
    bases = (NoRegistry, cls, StreamedModule)
    derived: type[nn.Module] = type.__new__(metaclass, cls.__name__, bases, namespace)
    if issubclass(metaclass, abc.ABCMeta):  # its isinstance() remembers answers by class
        abc._abc_init(derived)  # type: ignore[attr-defined]
    _derived[(cls, *names)] = derived
    return derived


def _maker_of(cls: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda _, *args, **kwargs: cls(*args, **kwargs)


def _call_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """Not by super(): the class may be changed back while the call is under way."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        streamed: StreamHandle | None = self.__dict__.get(KEY)
        if streamed is None or torch.compiler.is_dynamo_compiling():
            return cls.__call__(self, *args, **kwargs)
        return streamed.watch(cls.__call__, args, kwargs)

    return call


def _refuse_copy(module: nn.Module) -> NoReturn:
    handle(module).refuse_copy()

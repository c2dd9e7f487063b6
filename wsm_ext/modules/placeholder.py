"""What stands in a module for a parameter whose bytes are not on the device now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

import torch
from torch.utils._pytree import tree_leaves, tree_map_only


class Lender(Protocol):
    """Who has the bytes."""

    def use(self, name: str, operation: Callable[[torch.Tensor], Any]) -> Any:
        """What the operation makes of the parameter, while its bytes are there."""

    def own(self, values: Any) -> Any:
        """The values, with copies of what would be overwritten after the operation."""

    def allow(self, parameters: list[StreamedParameter]) -> None:
        """Raise where one operation on all of these would fetch too much."""

    def replace(self, name: str, value: torch.Tensor) -> None:
        """Use other data from now on."""


class StreamedParameter(torch.Tensor):
    """A parameter's true shape, dtype and device, without storage.

    Any operation on it borrows the bytes: inside a pass it gets them, outside it gets a copy. It
    never gives stale bytes. Detached it is another placeholder: so a `state_dict` can be made, and
    what is in it cannot be saved either. Data that somebody sets stands for it from then on.
    """

    wsm_name: str
    _lender: Lender
    _set_data: torch.Tensor | None = None

    @staticmethod
    def __new__(
        cls,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        name: str,
        lender: Lender,
    ) -> StreamedParameter:
        with torch.inference_mode(False):  # made by a detach inside of it, say
            made = torch.Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=device, requires_grad=False
            )
        made._is_param = True  # isinstance(_, nn.Parameter)
        made.wsm_name = name
        made._lender = lender
        return made

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0].detached()
        absent = list({id(leaf): leaf for leaf in _absent_in((args, kwargs))}.values())
        if all(parameter._set_data is None for parameter in absent):
            _refuse_writes(func, args, kwargs)
        if len(absent) > 1:
            absent[0]._lender.allow(absent)
        return _run(func, args, kwargs)

    @property
    def data(self) -> torch.Tensor:
        return self.detached() if self._set_data is None else self._set_data.data

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if isinstance(value, StreamedParameter) and value.wsm_name == self.wsm_name:
            return  # its own: a conversion that changes nothing
        self._lender.replace(self.wsm_name, value)
        self._set_data = value.detach()

    def detached(self) -> StreamedParameter:
        return StreamedParameter(self.shape, self.dtype, self.device, self.wsm_name, self._lender)

    def _copy(self) -> torch.Tensor:
        return self.detach().clone()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        array = self._copy().cpu().numpy(*args, **kwargs)
        array.flags.writeable = False  # what is written would be lost
        return array

    def tolist(self) -> Any:
        return self._copy().tolist()

    def __dlpack__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("cannot be shared with another library, whose writes would be lost")

    def data_ptr(self) -> NoReturn:
        self._refuse("has no address of its own")

    def untyped_storage(self) -> NoReturn:
        self._refuse("has no storage of its own")

    def _refuse(self, why: str) -> NoReturn:
        raise RuntimeError(
            f"parameter {self.wsm_name!r} is streamed and {why}. Use fetch({self.wsm_name!r}) of"
            " the streamed module for a copy, or close() the streamed module first"
        )

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return (
            f"StreamedParameter({self.wsm_name!r}, shape={tuple(self.shape)}, dtype={self.dtype},"
            f" device={self.device})"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"parameter {self.wsm_name!r} is streamed and cannot be pickled or copied; pickle the"
            " module before stream(), or after close()"
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce_ex__(2)


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation with true parameters for placeholders: borrowed one inside the other."""
    absent = next(_absent_in((args, kwargs)), None)
    if absent is None:
        return func(*args, **kwargs)

    def with_it(parameter: torch.Tensor) -> Any:
        def put(leaf: StreamedParameter) -> torch.Tensor:
            return parameter if leaf is absent else leaf

        return absent._lender.own(
            _run(func, *tree_map_only(StreamedParameter, put, (args, kwargs)))
        )

    if absent._set_data is not None:
        return with_it(absent._set_data)
    return absent._lender.use(absent.wsm_name, with_it)


def _absent_in(values: Any) -> Iterator[StreamedParameter]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, StreamedParameter))


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not func._schema.is_mutable:
        return
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        written = given.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes and isinstance(written, StreamedParameter):
            written._refuse("cannot be written to")

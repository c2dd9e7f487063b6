"""What stands in a module for a parameter whose bytes are not on the device now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only


class StreamedParameter(torch.Tensor):
    """A parameter's true shape, dtype and device, without storage.

    Any operation on it asks `resolve(name)` for the bytes: inside a pass that answers with a copy,
    outside it raises an error that names the parameter. It never gives stale bytes.
    """

    wsm_name: str
    _resolve: Callable[[str], torch.Tensor]

    @staticmethod
    def __new__(
        cls,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        name: str,
        resolve: Callable[[str], torch.Tensor],
    ) -> StreamedParameter:
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=False
        )
        made._is_param = True  # isinstance(_, nn.Parameter)
        made.wsm_name = name
        made._resolve = resolve
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
        def resolved(parameter: StreamedParameter) -> torch.Tensor:
            return parameter._resolve(parameter.wsm_name)

        args, kwargs = tree_map_only(StreamedParameter, resolved, (args, kwargs or {}))
        return func(*args, **kwargs)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolve(self.wsm_name).cpu().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self._resolve(self.wsm_name).tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolve(self.wsm_name).__dlpack__(*args, **kwargs)

    def data_ptr(self) -> NoReturn:
        self._resolve(self.wsm_name)
        raise RuntimeError(
            f"parameter {self.wsm_name!r} is streamed and has no address between uses"
        )

    def untyped_storage(self) -> NoReturn:
        self._resolve(self.wsm_name)
        raise RuntimeError(
            f"parameter {self.wsm_name!r} is streamed and has no storage between uses"
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

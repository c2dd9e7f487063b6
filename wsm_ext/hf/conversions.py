"""Tensor images of what a conversion makes of a checkpoint's tensors.

A conversion is run once on tensors without bytes that remember where they come from. What it only
moves, in large enough boxes, is an image of several extents: the reads put every byte where it
belongs. All else becomes an arrival transform: the conversion runs on the device, on each arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from ..checkpoints.arrival import Arrival, ArrivingTensor
from ..checkpoints.image import Extent, TensorImage

# Every box is a copy of its own. Many small ones cost more than to transform what arrives whole.
_MANY_PIECES = 1024
_SMALL_PIECE = 64 << 10

Conversion = Callable[[Sequence[torch.Tensor]], Mapping[str, torch.Tensor]]

_aten = torch.ops.aten
_SAME = (_aten.clone.default, _aten.detach.default, _aten.alias.default)


def cast(image: TensorImage, dtype: torch.dtype) -> TensorImage:
    """The image of the same tensor in `dtype`."""
    if image.dtype == dtype:
        return image
    arrival = image.arrival or Arrival((ArrivingTensor(0, image.dtype, image.shape),))
    return replace(image, dtype=dtype, arrival=arrival)


def convert(conversion: Conversion, sources: Sequence[TensorImage]) -> dict[str, TensorImage]:
    """Images of the tensors that `conversion` makes of `sources`, by the names that it gives them.

    If the sources have several dtypes, the images have that of the first, until they are cast.
    Whatever `conversion` raises is passed on.
    """
    outputs = conversion([torch.empty(s.shape, dtype=s.dtype, device="meta") for s in sources])
    placed: dict[str, TensorImage] = {}
    if len({source.dtype for source in sources}) == 1:
        try:
            moved = conversion([_Moved.whole(i, source) for i, source in enumerate(sources)])
            placed = {n: image for n, t in moved.items() if (image := _placed(n, t, sources))}
        except _NotMovedError:
            pass
    return {
        name: placed.get(name) or _transformed(name, tensor.shape, conversion, sources)
        for name, tensor in outputs.items()
    }


def _transformed(
    name: str, shape: torch.Size, conversion: Conversion, sources: Sequence[TensorImage]
) -> TensorImage:
    """An image of all sources whole, one after another, and the conversion at their arrival."""
    extents: list[Extent] = []
    arriving: dict[int, ArrivingTensor] = {}
    position = 0
    # The widest first: then each begins at a multiple of its own items.
    for index in sorted(range(len(sources)), key=lambda i: -sources[i].dtype.itemsize):
        source = sources[index]
        arriving[index] = ArrivingTensor(position, source.dtype, source.shape)
        extents += [replace(e, tensor_offset=e.tensor_offset + position) for e in source.extents]
        position += source.nbytes

    def make(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return conversion(tensors)[name]

    arrival = Arrival(tuple(arriving[index] for index in range(len(sources))), make)
    return TensorImage(name, sources[0].dtype, tuple(shape), tuple(extents), arrival)


# What a conversion only moves


class _NotMovedError(Exception):
    """The conversion does more than to move bytes in ways that are followed here."""


class _Box(NamedTuple):
    """A box of a tensor, and the elements of a source that lie in it."""

    start: tuple[int, ...]
    view: torch.Tensor  # on meta, a view of the whole source: its shape is the box's
    source: int


class _Moved(torch.Tensor):
    """A tensor without bytes, in boxes of its sources.

    Joins of such tensors are followed, and any view of one that is a single box.
    """

    boxes: list[_Box]

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, boxes: list[_Box]) -> _Moved:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device("meta")
        )
        tensor.boxes = boxes
        return tensor

    def __init__(self, *_: object) -> None:
        super().__init__()

    @classmethod
    def whole(cls, index: int, source: TensorImage) -> _Moved:
        view = torch.empty(source.shape, dtype=source.dtype, device="meta")
        return cls(source.shape, source.dtype, [_Box((0,) * view.ndim, view, index)])

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _aten.cat.default:
            return _concatenated(*args)
        if func is _aten.stack.default:
            return _stacked(*args)
        moved = args[0]
        if not isinstance(moved, _Moved):
            raise _NotMovedError(str(func))
        if func in _SAME:
            return _Moved(moved.shape, moved.dtype, moved.boxes)
        return _viewed(func, moved, args[1:], kwargs or {})


def _concatenated(tensors: Sequence[_Moved], dim: int = 0) -> _Moved:
    dim %= tensors[0].ndim
    boxes: list[_Box] = []
    position = 0
    for tensor in tensors:
        for box in tensor.boxes:
            start = list(box.start)
            start[dim] += position
            boxes.append(box._replace(start=tuple(start)))
        position += tensor.shape[dim]
    shape = list(tensors[0].shape)
    shape[dim] = position
    return _Moved(shape, tensors[0].dtype, boxes)


def _stacked(tensors: Sequence[_Moved], dim: int = 0) -> _Moved:
    dim %= tensors[0].ndim + 1
    shape = list(tensors[0].shape)
    shape.insert(dim, len(tensors))
    boxes = [
        _Box((*p.start[:dim], index, *p.start[dim:]), p.view.unsqueeze(dim), p.source)
        for index, tensor in enumerate(tensors)
        for p in tensor.boxes
    ]
    return _Moved(shape, tensors[0].dtype, boxes)


def _viewed(func: Any, moved: _Moved, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(moved.boxes) != 1:
        raise _NotMovedError(str(func))
    box = moved.boxes[0]
    storage = box.view.untyped_storage()._cdata

    def wrap(view: torch.Tensor) -> _Moved:
        if view.untyped_storage()._cdata != storage or view.dtype != moved.dtype:
            raise _NotMovedError(str(func))
        return _Moved(view.shape, view.dtype, [_Box((0,) * view.ndim, view, box.source)])

    try:
        result = func(box.view, *args, **kwargs)
    except RuntimeError as error:  # a shape that no strides can give
        raise _NotMovedError(str(func)) from error
    return tree_map_only(torch.Tensor, wrap, result)


# From boxes to extents


def _placed(name: str, moved: torch.Tensor, sources: Sequence[TensorImage]) -> TensorImage | None:
    """The image whose extents are the boxes; None if these are many and small."""
    if not isinstance(moved, _Moved):
        return None
    runs = [_run(box, moved.shape) for box in moved.boxes if box.view.numel()]
    count = sum(prod(box.view.shape[:dims]) for box, (dims, _) in _with(runs, moved))
    if count > _MANY_PIECES and moved.numel() * moved.dtype.itemsize < count * _SMALL_PIECE:
        return None
    extents = [
        extent
        for box, (dims, items) in _with(runs, moved)
        for extent in _extents(box, dims, items, moved.shape, sources[box.source])
    ]
    return TensorImage(name, moved.dtype, tuple(moved.shape), tuple(extents))


def _with(runs: list[tuple[int, int]], moved: _Moved) -> Iterator[tuple[_Box, tuple[int, int]]]:
    return zip((box for box in moved.boxes if box.view.numel()), runs, strict=True)


def _run(box: _Box, shape: Sequence[int]) -> tuple[int, int]:
    """How many outer dimensions the box's runs of bytes are cut by, and the items of each run."""
    items = 1
    for dim in reversed(range(len(shape))):
        size = box.view.shape[dim]
        if size > 1 and box.view.stride(dim) != items:
            return dim + 1, items
        items *= size
        if size != shape[dim]:
            return dim, items
    return 0, items


def _extents(
    box: _Box, dims: int, items: int, shape: Sequence[int], source: TensorImage
) -> Iterator[Extent]:
    itemsize = source.dtype.itemsize
    strides = torch.empty(tuple(shape), device="meta").stride()
    first = sum(start * stride for start, stride in zip(box.start, strides, strict=True))
    begin_of_all = int(box.view.storage_offset())
    for index in product(*(range(size) for size in box.view.shape[:dims])):
        at = first + sum(i * s for i, s in zip(index, strides, strict=False))
        begin = begin_of_all + sum(i * s for i, s in zip(index, box.view.stride(), strict=False))
        yield from _cut(source, begin * itemsize, items * itemsize, at * itemsize)


def _cut(source: TensorImage, begin: int, nbytes: int, at: int) -> Iterator[Extent]:
    """The source's bytes from `begin`, to lie at `at`."""
    for extent in source.extents:
        first = max(begin, extent.tensor_offset)
        last = min(begin + nbytes, extent.tensor_offset + extent.nbytes)
        if first < last:
            offset = extent.offset + first - extent.tensor_offset
            yield Extent(extent.shard, offset, last - first, at + first - begin)

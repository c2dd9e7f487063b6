"""The device memory of a plan: the arena, and a block for each of its homes."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass, field

import torch

from .. import _engine
from ..modules.raw_memory import address_of, without_modes
from ..modules.sources import Source

_HUGE_PAGE = 2 << 20

# What a block holds: the names and sizes of its tensors, in their order.
_Contents = tuple[tuple[str, int], ...]


def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """`nbytes` of device memory that begin at a multiple of 256 bytes.

    Raises torch.OutOfMemoryError.
    """
    if device.type == "cpu":
        return in_huge_pages(nbytes)
    with without_modes():
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


@without_modes()
def in_huge_pages(nbytes: int) -> torch.Tensor:
    """RAM in huge pages, where the kernel has them: it is written to for the first time three times
    as fast, and read with fewer misses of the TLB. Only whole ones are asked for, so that no more
    becomes resident than was counted."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    try:
        memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise torch.OutOfMemoryError(f"cannot map {nbytes} bytes of RAM: {error}") from error
    block = torch.frombuffer(memory, dtype=torch.uint8)
    start = -block.data_ptr() % _HUGE_PAGE
    whole = nbytes // _HUGE_PAGE * _HUGE_PAGE
    if whole and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return block[start : start + nbytes]


@dataclass
class DeviceMemory:
    """Arena and home blocks as uint8 tensors, and which blocks hold their bytes already."""

    arena: torch.Tensor
    homes: list[torch.Tensor] = field(default_factory=list)
    loaded: list[bool] = field(default_factory=list)
    contents: list[_Contents] = field(default_factory=list)

    @staticmethod
    def allocate(
        plan: _engine.Plan,
        source: Source,
        device: torch.device,
        before: DeviceMemory | None = None,
    ) -> DeviceMemory:
        """Memory for the plan. Blocks of `before` that the plan has too are taken over; `before` is
        emptied, so that what is freed can serve what is new.

        Raises torch.OutOfMemoryError.
        """
        stay: dict[_Contents, torch.Tensor] = {}
        if before is not None:
            stay = dict(zip(before.contents, before.homes, strict=True))
            before.clear(device)
        wanted = [_contents_of(block, source) for block in plan.home_blocks]
        stay = {contents: block for contents, block in stay.items() if contents in wanted}
        # On a CPU both come out of one memory: what the engine will map is held free meanwhile.
        host_bytes = plan.cache_bytes + plan.staging_bytes + 2 * _HUGE_PAGE
        kept_free = in_huge_pages(host_bytes) if device.type == "cpu" else None
        memory = DeviceMemory(allocate(plan.arena_bytes, device))
        for planned, contents in zip(plan.home_blocks, wanted, strict=True):
            block = stay.get(contents)
            loaded = block is not None and block.numel() >= planned.nbytes
            if block is None or not loaded:
                block = allocate(planned.nbytes, device)
            memory.homes.append(block)
            memory.loaded.append(loaded)
            memory.contents.append(contents)
        del kept_free
        return memory

    def clear(self, device: torch.device) -> None:
        self.arena = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.homes, self.loaded, self.contents = [], [], []
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def arena_address(self, device: torch.device) -> int:
        return address_of(self.arena, self.arena.nbytes, device.type)

    def home_memory(self, device: torch.device) -> list[_engine.HomeMemory]:
        """The home blocks as the engine takes them."""
        return [
            _engine.HomeMemory(address_of(block, block.nbytes, device.type), loaded)
            for block, loaded in zip(self.homes, self.loaded, strict=True)
        ]


def _contents_of(block: _engine.HomeBlock, source: Source) -> _Contents:
    tensors = [source.tensors[index] for index in block.tensors]
    return tuple((tensor.name, tensor.nbytes) for tensor in tensors)

"""Checks the bytes of each unit against the checkpoint's hashes, where they lie when they are used.

What is hashed is what is known by a hash: a tensor of the checkpoint. A parameter may be made of
many, and of a share of some:

    tensors in the files   | q        | k        |     | qkv: q share | k share | v share |
    image on the device    | q bytes    k bytes  |     | q share |  <- no hash is known of it

Where an image has a tensor whole, its extents are hashed in the order of the file.
Where it has a share alone, the tensor is read once at start and checked as a whole; the hash of the
share, found on the way, is what later loads are compared with.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from .. import _engine
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hashes import (
    ByteRun,
    ExtentToHash,
    Recorded,
    Share,
    hash_extents,
    new_hash,
    read_sidecar,
    sidecar_of,
)
from ..checkpoints.image import CheckpointError, TensorImage
from ..modules.sources import Source, extents_of

_BLOCK_BYTES = 8 << 20


class IntegrityError(OSError):
    """Bytes that are not those of the checkpoint; names the tensor, the unit and the file."""


@dataclass(frozen=True)
class _Stored:
    """A tensor as a file has it. `offset`: where its bytes begin."""

    name: str
    shard: int
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class _Run(NamedTuple):
    """Bytes of a tensor that lie in an image one after another."""

    inner: ByteRun
    image_offset: int


@dataclass
class _ImageShare:
    """Bytes of one tensor in an image: its runs, ascending and apart. `expected` is their hash."""

    tensor: _Stored
    runs: list[_Run]
    expected: str = ""

    @property
    def nbytes(self) -> int:
        return sum(run.inner.nbytes for run in self.runs)

    @property
    def inner(self) -> Share:
        return tuple(run.inner for run in self.runs)

    @property
    def whole(self) -> bool:
        end = 0
        for run in self.inner:
            if run.offset != end:
                return False
            end = run.end
        return end == self.tensor.nbytes


@dataclass
class Counts:
    """What was checked: loads of units, and bytes of these and of all else."""

    units: int = 0
    bytes: int = 0


class Image:
    """What is known of one tensor image."""

    def __init__(self, checker: Checker, shares: list[_ImageShare], nbytes: int) -> None:
        self._checker = checker
        self._shares = shares
        self._checked = False
        self.nbytes = nbytes

    def check(self, memory: torch.Tensor, where: str) -> None:
        """Raise IntegrityError where `memory` (uint8, on any device, in the order of its stream)
        has other bytes. `where` says what they were loaded for."""
        assert memory.numel() == self.nbytes
        for share in self._shares:
            digest = self._checker.hash_of(memory, share.runs)
            if digest != share.expected:
                self._checker.refuse(share, digest, where)
        self._checker.counts.bytes += self.nbytes

    def check_once(self, memory: torch.Tensor, where: str) -> None:
        """The same, for what units share and has one place."""
        if not self._checked:
            self.check(memory, where)
        self._checked = True


class UnitCheck:
    """Checks a unit when it is acquired, once for each time it was loaded."""

    def __init__(
        self,
        engine: _engine.Engine,
        index: int,
        where: str,
        images: Sequence[tuple[Image, torch.Tensor]],
        counts: Counts,
    ) -> None:
        self._engine = engine
        self._index = index
        self._where = where
        self._images = images
        self._counts = counts

    def __call__(self, unchecked: bool) -> None:
        """`unchecked`: the unit was loaded since this has last succeeded. Wrong bytes are dropped,
        so that the next use reads them again."""
        if not unchecked:
            return
        try:
            for image, memory in self._images:
                image.check(memory, self._where)
        except IntegrityError:
            self._engine.discard(self._index)
            raise
        self._counts.units += 1


class Checker:
    """The hashes of one checkpoint, against which its bytes are checked.

    `asked`: the setting, as it was given. Raises CheckpointError where the sidecar is missing, not
    valid, or of another checkpoint.
    """

    def __init__(
        self, checkpoint: Checkpoint, sidecar: Path | None, asked: str = "verify=True"
    ) -> None:
        new_hash()
        self.counts = Counts()
        self._files = checkpoint.shards
        self._sidecar = sidecar_of(checkpoint) if sidecar is None else sidecar
        if not self._sidecar.exists():
            model = "MODEL" if checkpoint.source is None else checkpoint.source
            option = "" if sidecar is None else f" --sidecar {sidecar}"
            raise CheckpointError(
                f"{asked}: there are no hashes at {self._sidecar}; `wsm verify {model}{option}`"
                " makes them"
            )
        recorded = read_sidecar(self._sidecar)
        self._tensors: list[list[_Stored]] = []  # by shard, those with bytes, as they lie
        self._begins: list[list[int]] = []
        self._recorded: dict[_Stored, Recorded | None] = {}
        self._images: dict[_Stored, TensorImage] = {}
        for shard in checkpoint.stored():
            stored = [
                _Stored(image.name, e.shard, e.offset, e.nbytes)
                for image in shard
                for e in image.extents
            ]
            self._tensors.append(stored)
            self._begins.append([tensor.offset for tensor in stored])
            self._images.update(zip(stored, (i for i in shard if i.extents), strict=True))
            self._recorded.update((tensor, recorded.get(tensor.name)) for tensor in stored)
        self._known: dict[tuple[_Stored, Share], str] = {}
        self._bounce: torch.Tensor | None = None

    # -- what is expected --------------------------------------------------------------------------

    def images_of(self, source: Source) -> list[Image]:
        """Of each of the source's tensors. May read those from the files of which images have
        shares alone, and then raises as reading does, or IntegrityError."""
        ram = {tensor.data_ptr(): tensor for tensor in source.kept}
        shares: list[list[_ImageShare]] = []
        for tensor in source.tensors:
            extents = tensor.extents
            computed = ram.get(source.memory[extents[0].shard]) if extents else None
            if computed is None:
                shares.append(self._shares_of(extents))
            else:  # no file has it: what was computed is what should arrive
                share = _all_of(_Stored(tensor.name, -1, 0, tensor.nbytes))
                share.expected = self.hash_of(computed.reshape(-1).view(torch.uint8), share.runs)
                shares.append([share])
        self._learn([share for image in shares for share in image])
        return [
            Image(self, image, tensor.nbytes)
            for image, tensor in zip(shares, source.tensors, strict=True)
        ]

    def image_of(self, image: TensorImage) -> Image:
        shares = self._shares_of(extents_of(image))
        self._learn(shares)
        return Image(self, shares, image.arriving_bytes)

    def _shares_of(self, extents: Iterable[_engine.Extent]) -> list[_ImageShare]:
        """The extents by tensor. Bytes that an image has twice are in two shares."""
        runs_of: dict[_Stored, list[_Run]] = {}
        for extent in extents:
            for tensor, run in self._cut(extent):
                runs_of.setdefault(tensor, []).append(run)
        shares: list[_ImageShare] = []
        for tensor, runs in runs_of.items():
            open_shares: list[_ImageShare] = []
            for run in sorted(runs):
                for share in open_shares:
                    if share.runs[-1].inner.end <= run.inner.offset:
                        share.runs.append(run)
                        break
                else:
                    open_shares.append(_ImageShare(tensor, [run]))
            shares += open_shares
        return shares

    def _cut(self, extent: _engine.Extent) -> Iterable[tuple[_Stored, _Run]]:
        """The extent's runs of bytes, and the tensor that each belongs to."""
        shard, begin, at = extent.shard, extent.offset, extent.tensor_offset
        end = begin + extent.nbytes
        while begin < end:
            index = bisect_right(self._begins[shard], begin) - 1
            tensor = self._tensors[shard][index] if index >= 0 else None
            if tensor is None or begin >= tensor.end:
                raise CheckpointError(
                    f"verify: bytes of {self._files[shard]} from offset {begin} belong to no tensor"
                    " of the file, so there is no hash of them"
                )
            length = min(end, tensor.end) - begin
            yield tensor, _Run(ByteRun(begin - tensor.offset, length), at)
            begin += length
            at += length

    def _learn(self, shares: Iterable[_ImageShare]) -> None:
        """Finds what each share's hash should be."""
        unknown: dict[_Stored, dict[Share, None]] = {}
        for share in shares:
            if share.expected:
                continue
            recorded = self._recorded_of(share.tensor)
            if share.whole:
                share.expected = recorded.digest
            elif (share.tensor, share.inner) not in self._known:
                unknown.setdefault(share.tensor, {})[share.inner] = None
        self._read(unknown)
        for share in shares:
            share.expected = share.expected or self._known[share.tensor, share.inner]

    def _recorded_of(self, tensor: _Stored) -> Recorded:
        recorded, image = self._recorded[tensor], self._images[tensor]
        if recorded is not None and recorded.describes(image):
            return recorded
        in_file = f"is {image.dtype} {list(image.shape)} in {self._files[tensor.shard]}"
        in_sidecar = (
            f"but {recorded.dtype} {list(recorded.shape)} in {self._sidecar}"
            if recorded is not None
            else f"and {self._sidecar} has no hash of it"
        )
        raise CheckpointError(
            f"verify: tensor {tensor.name!r} {in_file}, {in_sidecar}: the hashes are of another"
            " checkpoint. `wsm verify` compares the two, and with --update records anew"
        )

    def _read(self, unknown: dict[_Stored, dict[Share, None]]) -> None:
        extents = [
            ExtentToHash(tensor.shard, tensor.offset, tensor.nbytes, tuple(shares))
            for tensor, shares in unknown.items()
        ]
        if not extents:
            return
        hashed = hash_extents(self._files, extents)
        for (tensor, shares), hashes in zip(unknown.items(), hashed, strict=True):
            whole = _all_of(tensor)
            whole.expected = self._recorded_of(tensor).digest
            if hashes.digest != whole.expected:
                self.refuse(whole, hashes.digest, "the file, before anything was loaded")
            for share, digest in zip(shares, hashes.shares, strict=True):
                self._known[tensor, share] = digest

    # -- what is found -----------------------------------------------------------------------------

    def hash_of(self, memory: torch.Tensor, runs: Iterable[_Run]) -> str:
        hasher = new_hash()
        for run in runs:
            end = run.image_offset + run.inner.nbytes
            for begin in range(run.image_offset, end, _BLOCK_BYTES):
                hasher.update(self._host(memory[begin : min(begin + _BLOCK_BYTES, end)]))
        digest: str = hasher.hexdigest()
        return digest

    def _host(self, block: torch.Tensor) -> Any:
        """Its bytes in RAM, where the host may read them now."""
        if block.device.type == "cpu":
            return block.numpy()
        if self._bounce is None:
            self._bounce = _pinned(_BLOCK_BYTES)
        bounce = self._bounce[: block.numel()]
        return bounce.copy_(block).numpy()  # waits for the stream, which waits for the load

    def check_copy(self, original: torch.Tensor, placed: torch.Tensor, where: str) -> None:
        """What was made in RAM, of bytes that were checked, arrived on the device as it is."""
        arrived = placed.detach().cpu()
        if not torch.equal(_bytes_of(arrived), _bytes_of(original)):
            raise IntegrityError(
                f"{where} has other bytes on {placed.device} than were copied there: the link or"
                " the device's memory damaged them. Run again; if it comes back, test the device"
            )

    def refuse(self, share: _ImageShare, digest: str, where: str) -> NoReturn:
        tensor = share.tensor
        if tensor.shard < 0:
            source, advice = "computed, in RAM", _DAMAGED
        else:
            source = f"{self._files[tensor.shard]}, offset {tensor.offset}, {tensor.nbytes} bytes"
            advice = self._advice(tensor)
        within = "" if share.whole else f" in {share.nbytes} of its bytes"
        raise IntegrityError(
            f"tensor {tensor.name!r} is not as it was recorded{within}: its hash is {digest}, not"
            f" {share.expected} ({where}; {source}). {advice}"
        )

    def _advice(self, tensor: _Stored) -> str:
        """Where the fault is, by another look at the file."""
        try:
            extent = ExtentToHash(tensor.shard, tensor.offset, tensor.nbytes)
            [now] = hash_extents(self._files, [extent])
        except (OSError, TimeoutError) as error:
            return f"The file cannot be read now: {error}"
        if now.digest == self._recorded_of(tensor).digest:
            return _DAMAGED
        return (
            f"The file does not have the bytes that {self._sidecar} records: copy or download it"
            " again. If it was changed on purpose, `wsm verify --update` records it anew"
        )


_DAMAGED = (
    "The original is right, so the bytes were damaged on their way to where they are used (by RAM,"
    " the link, the device's memory, or a read). They are read again at the next use; if it comes"
    " back, test the machine's memory and drive"
)


def _all_of(tensor: _Stored) -> _ImageShare:
    return _ImageShare(tensor, [_Run(ByteRun(0, tensor.nbytes), 0)])


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _pinned(nbytes: int) -> torch.Tensor:
    with torch.inference_mode(False):
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:  # refused: pageable memory will do
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

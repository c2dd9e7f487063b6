"""Hostile checkpoints by the thousand: sound ones, spoiled by a generator.

    python tests/hostile.py --count 100000 --seed 1 --json build/hostile.json

Headers are judged against the safetensors package: what `Checkpoint` accepts, `safe_open` accepts
too, with the same names, shapes, dtypes and bytes. What is refused is a CheckpointError that names
the file. Indices are judged by what their text says. Small ones that are accepted are streamed, and
give the bits that `safe_open` gives. Nothing takes long, and memory stays where it was.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import json
import os
import platform
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from hostile_text import INDEX_SPOILERS, SPOILERS, TEXT_SPOILERS, Header, sound_header
from safetensors import safe_open
from torch import nn

import wsm_ext as wsm
from wsm_ext.checkpoints.checkpoint import Checkpoint
from wsm_ext.checkpoints.header import MAX_DIMENSIONS
from wsm_ext.checkpoints.image import CheckpointError
from wsm_ext.checkpoints.index import INDEX_SUFFIX

CASE_SECONDS = 2.0  # of the processor: a small file takes milliseconds
HANG_SECONDS = 300
GROWTH_BYTES = 256 << 20
STREAMED_BYTES = 1 << 20
BUDGETS: dict[str, Any] = {
    "device": "cpu",
    "device_memory": "8MiB",
    "host_memory": "1MiB",
    "config": {"home_bytes": 0, "measure": False},
}


class Hostile:
    """Makes cases in a folder and judges them; `counts` by outcome.

    A case that is judged wrongly raises AssertionError; its files are left in the folder.
    """

    def __init__(self, folder: Path, seed: int, most_streamed: int) -> None:
        self.folder = folder
        self.seed = seed
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.slowest_s = 0.0
        self._left_to_stream = most_streamed
        self._file = folder / "x.safetensors"
        self._make_shards()

    def run(self, count: int) -> None:
        for number in range(count):
            kind = self.file_case if self.random.random() < 0.75 else self.index_case
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            begin = time.process_time()
            try:
                kind()
            except BaseException:
                print(f"case {number} of seed {self.seed}", file=sys.stderr)
                raise
            finally:
                faulthandler.cancel_dump_traceback_later()
            seconds = time.process_time() - begin
            self.slowest_s = max(self.slowest_s, seconds)
            assert seconds < CASE_SECONDS, f"case {number} took {seconds:.1f} s"

    # -- files

    def file_case(self) -> None:
        content = self._spoiled_file()
        self._file.write_bytes(content)
        ours = self._open(self._file, str(self._file))
        theirs = _oracle(self._file)
        if ours is None:
            outcome = "refused" if theirs is None else "stricter"
            assert theirs is None or _known_to_be_stricter(theirs), "safe_open accepts it"
            self.counts[f"file {outcome}"] += 1
            return
        self.counts["file accepted"] += 1
        assert theirs is not None, "accepted, and safe_open refuses it"
        assert list(theirs) == list(ours.tensors) or set(theirs) == set(ours.tensors)
        _expect_equal(ours, theirs)
        self._stream(ours, theirs)

    def _spoiled_file(self) -> bytes:
        header = sound_header(self.random)
        times = self.random.choice([0, 1, 1, 1, 2, 3])
        of_values = self.random.randint(0, times)
        for _ in range(of_values):
            self.random.choice(SPOILERS)(self.random, header)
        text = header.text()
        for _ in range(times - of_values):
            text = self.random.choice(TEXT_SPOILERS)(self.random, text)
        return self._framed(text, header)

    def _framed(self, text: bytes, header: Header) -> bytes:
        length, data = len(text), header.data
        how = self.random.randrange(16)
        if how == 0:
            length += self.random.choice([-1, 1, 8, -8, 100])
        elif how == 1:
            length = self.random.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 8, 100_000_001])
        elif how == 2:
            data = data[: self.random.randrange(len(data) + 1)]
        elif how == 3:
            data += bytes(self.random.randrange(1, 20))
        content = struct.pack("<Q", length % 2**64) + text + data
        if how == 4:
            content = content[: self.random.randrange(len(content))]
        if how == 5:
            content = struct.pack(">Q", length % 2**64) + text + data
        return content

    # -- indices

    def index_case(self) -> None:
        weight_map: dict[str, Any] = {"a": "1.safetensors", "b": "1.safetensors"}
        weight_map |= {"c": self.random.choice(["2.safetensors", "sub/3.safetensors"])}
        content: Any = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        times = self.random.choice([0, 1, 1, 1, 2, 3])
        of_values = self.random.randint(0, times)
        for _ in range(of_values):
            content = self.random.choice(INDEX_SPOILERS)(self.random, content, self.folder)
        text = json.dumps(content).encode("utf-8", "surrogatepass")
        for _ in range(times - of_values):
            text = self.random.choice(TEXT_SPOILERS)(self.random, text)
        index = self.folder / f"model{INDEX_SUFFIX}"
        index.write_bytes(text)
        ours = self._open(index, str(self.folder))
        if ours is None:
            self.counts["index refused"] += 1
            return
        self.counts["index accepted"] += 1
        listed = _listed(text)
        assert set(ours.tensors) == set(listed), "not what the index lists"
        theirs = {}
        for name, file in listed.items():
            inside = os.path.normpath(self.folder / file)
            assert inside.startswith(f"{self.folder}{os.sep}"), f"{file!r} leaves the folder"
            with safe_open(inside, framework="pt") as shard:
                theirs[name] = shard.get_tensor(name)
        _expect_equal(ours, theirs)
        self._stream(ours, theirs)

    def _make_shards(self) -> None:
        from safetensors.torch import save_file

        (self.folder / "sub").mkdir()
        a, b, c = torch.arange(6.0), torch.arange(5, dtype=torch.int16), torch.arange(3) + 7
        save_file({"a": a, "b": b}, self.folder / "1.safetensors")
        save_file({"c": c}, self.folder / "2.safetensors")
        save_file({"c": c + 1}, self.folder / "sub" / "3.safetensors")
        save_file({"a": a, "b": b, "c": c}, self.folder.parent / "outside.safetensors")
        (self.folder / "link.safetensors").symlink_to("1.safetensors")
        (self.folder / "loop.safetensors").symlink_to("loop.safetensors")
        (self.folder / "folder.safetensors").mkdir()
        os.mkfifo(self.folder / "pipe.safetensors")

    # -- both

    def _open(self, path: Path, named: str) -> Checkpoint | None:
        """None where it is refused as it should be: by an error that names the file."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tensors that an index does not list
                return Checkpoint.open(path)
        except CheckpointError as error:
            said = str(error)
        assert named in said, f"{said!r} does not name {named}"
        assert "\x1b" not in said, "what the file says would control the terminal"
        return None

    def _stream(self, checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
        module = _module_of(checkpoint) if self._left_to_stream else None
        if module is None:
            return
        self._left_to_stream -= 1
        with wsm.stream(module, checkpoint, **BUDGETS) as streamed:
            got = streamed()
        assert set(got) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(got[name], _as_bytes(tensor)), f"{name!r} was streamed wrongly"
        self.counts["streamed"] += 1


def _oracle(file: Path) -> dict[str, torch.Tensor] | None:
    """What the safetensors package gives; None where it gives an error."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.offset_keys()}
    except Exception:  # of whatever kind: not ours to judge
        return None


def _known_to_be_stricter(theirs: dict[str, torch.Tensor]) -> bool:
    sub_byte = {getattr(torch, "float4_e2m1fn_x2", None)}
    return any(
        tensor.dim() > MAX_DIMENSIONS
        or tensor.dtype in sub_byte
        or prod(max(dimension, 1) for dimension in tensor.shape) >= 2**63
        for tensor in theirs.values()
    )


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)  # a copy of a bool makes it 0 or 1


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), bytes(_as_bytes(tensor).numpy())


def _expect_equal(ours: Checkpoint, theirs: dict[str, torch.Tensor]) -> None:
    for name, tensor in theirs.items():
        image = ours.tensors[name]
        data = bytearray(image.nbytes)
        for extent in image.extents:
            with open(ours.shards[extent.shard], "rb") as file:
                file.seek(extent.offset)
                end = extent.tensor_offset + extent.nbytes
                data[extent.tensor_offset : end] = file.read(extent.nbytes)
        assert (image.dtype, image.shape, bytes(data)) == _bits(tensor), f"{name!r} differs"


def _listed(text: bytes) -> dict[str, str]:
    """An index's weight_map. Accepted with a key twice would be wrong."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs), "accepted with a key twice"
        return dict(pairs)

    listed: dict[str, str] = json.loads(text, object_pairs_hook=unique)["weight_map"]
    return listed


class Keeper(nn.Module):
    """Gives the bytes of its parameters, and of those of the modules inside it, by their names."""

    def forward(self) -> dict[str, torch.Tensor]:
        found = {
            key: _as_bytes(value).clone()
            for key, value in self._parameters.items()
            if value is not None
        }
        for child, module in self.named_children():
            found |= {f"{child}.{key}": value for key, value in module().items()}
        return found


def _module_of(checkpoint: Checkpoint) -> Keeper | None:
    """A module with the checkpoint's tensors as parameters; None where there can be none."""
    sizes = [image.nbytes for image in checkpoint.tensors.values()]
    if not 0 < sum(sizes) <= STREAMED_BYTES or any(
        max(image.shape, default=0) >= 2**31 for image in checkpoint.tensors.values()
    ):
        return None
    root = Keeper()
    for name, image in checkpoint.tensors.items():
        *path, key = name.split(".")
        owner: nn.Module = root
        for part in path:
            inner = owner._modules.get(part)
            if inner is None:
                if not part or hasattr(owner, part):
                    return None
                inner = Keeper()
                owner.add_module(part, inner)
            owner = inner
        if not key or hasattr(owner, key):
            return None
        value = torch.empty(image.shape, dtype=image.dtype, device="meta")
        owner.register_parameter(key, nn.Parameter(value, requires_grad=False))
    return root


def write_json(path: str, case: str, results: Any) -> None:
    environment = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "cpu_count": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "wsm_ext": wsm.__version__,
    }
    entry = {"benchmark": "hostile", "case": case, "environment": environment}
    Path(path).write_text(json.dumps([{**entry, "results": results}], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streamed", type=int, default=2000, help="the most that are streamed")
    parser.add_argument("--json", metavar="FILE", help="write the counts to FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        hostile = Hostile(Path(folder) / "model", options.seed, options.streamed)
        hostile.run(1000)  # what is loaded at first use counts as there before
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        hostile.run(options.count - 1000)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    assert growth < GROWTH_BYTES, f"memory has grown by {growth} bytes"
    results = {
        "cases": options.count,
        "seed": options.seed,
        "outcomes": dict(sorted(hostile.counts.items())),
        "processor_seconds": round(time.process_time() - begin, 1),
        "slowest_case_processor_s": round(hostile.slowest_s, 3),
        "memory_growth_bytes": growth,
    }
    print(json.dumps(results, indent=1))
    if options.json:
        write_json(options.json, "headers and indices", results)


if __name__ == "__main__":
    main()

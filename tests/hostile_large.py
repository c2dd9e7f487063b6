"""Hostile checkpoints of 100 MB, each opened in a process of its own: how long it takes, and how
much memory.

    python tests/hostile_large.py --json build/hostile-large.json
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile

from wsm_ext.checkpoints.checkpoint import Checkpoint
from wsm_ext.checkpoints.image import CheckpointError
from wsm_ext.checkpoints.index import INDEX_SUFFIX, MAX_INDEX_BYTES

LIMIT = 100_000_000  # of a header: the safetensors package's
MOST_SECONDS = 600
MOST_BYTES = 6 << 30  # some 60 bytes for each of the file: what small objects of Python take
SMALL = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def many(count: int) -> bytes:
    return ("{" + ",".join(f'"{i:x}":{SMALL}' for i in range(count)) + "}").encode()


def entry(shape: bytes) -> bytes:
    return b'{"a":{"dtype":"U8","shape":' + shape + b',"data_offsets":[0,1]}}'


def index(text: str) -> bytes:
    return ('{"weight_map":{' + text + "}}").encode()


def repeated(text: str, size: int = MAX_INDEX_BYTES - 100) -> str:
    return text * (size // len(text))


FILES: dict[str, Callable[[], bytes]] = {
    "header of spaces": lambda: header(b"{}".ljust(LIMIT)),
    "header over the limit": lambda: header(b"{}".ljust(LIMIT + 1)),
    "header of zeros": lambda: header(bytes(LIMIT)),
    "header of noise": lambda: header(bytes(range(256)) * (LIMIT // 256)),
    "header of brackets": lambda: header(b"[" * LIMIT),
    "one name": lambda: header(b'{"' + b"a" * (LIMIT - 200) + b'":' + SMALL.encode() + b"}"),
    "one shape": lambda: header(entry(b"[" + b"1," * (LIMIT // 2 - 100) + b"1]")) + b"0",
    "one number": lambda: header(entry(b"[" + b"9" * (LIMIT - 200) + b"]")) + b"0",
    "a million tensors": lambda: header(many(1_700_000)),
    "a name a million times": lambda: header(b'{"a":' + f"{SMALL}".encode() + b',"a":0' * 10**7),
}
INDICES: dict[str, Callable[[], bytes]] = {
    "index of spaces": lambda: index('"a":"1.safetensors"').ljust(MAX_INDEX_BYTES),
    "index over the limit": lambda: b" " * (MAX_INDEX_BYTES + 1),
    "index of brackets": lambda: b"[" * MAX_INDEX_BYTES,
    "index of lists": lambda: b"[" + b"[]," * (MAX_INDEX_BYTES // 3 - 9) + b"[]]",
    "index of objects": lambda: b"[" + b"{}," * (MAX_INDEX_BYTES // 3 - 9) + b"{}]",
    "index of noise": lambda: bytes(range(256)) * (MAX_INDEX_BYTES // 256),
    "one file name": lambda: index('"a":"' + "b" * (MAX_INDEX_BYTES - 100) + '.safetensors"'),
    "a key a million times": lambda: index(repeated('"a":0,') + '"a":0'),
    "a million names": lambda: index(
        ",".join(f'"{i:x}":"1.safetensors"' for i in range(MAX_INDEX_BYTES // 28))
    ),
}


def open_one(path: Path) -> None:
    """Prints the outcome, the processor's seconds, and the most that memory has grown by."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory_peak()
    begin = time.process_time()
    said = ""
    try:
        outcome = f"accepted: {len(Checkpoint.open(path).tensors)} tensors"
    except CheckpointError as error:
        outcome, said = "refused", str(error)
    seconds = time.process_time() - begin
    assert outcome != "refused" or str(path) in said
    assert len(said) < 10_000, "the message is as long as the file"
    print(json.dumps([outcome, round(seconds, 2), memory_peak() - before]))


def memory_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this kernel does not tell VmHWM")


def measure(folder: Path, name: str, make: Callable[[], bytes], file: str) -> dict[str, Any]:
    path = folder / file
    path.write_bytes(make())
    command = [sys.executable, __file__, "--one", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS)
    assert done.returncode == 0, f"{name}: {done.returncode}\n{done.stderr[-2000:]}"
    outcome, seconds, grown = json.loads(done.stdout)
    assert grown < MOST_BYTES, f"{name}: memory has grown by {grown} bytes"
    path.unlink()
    print(f"{name:28} {outcome:28} {seconds:7.2f} s {grown >> 20:6} MiB", flush=True)
    return {"case": name, "outcome": outcome, "seconds": seconds, "memory_bytes": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--one", metavar="FILE", help="open this one alone")
    options = parser.parse_args()
    if options.one:
        open_one(Path(options.one))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(Path(folder), *case, "x.safetensors") for case in FILES.items()]
        results += [measure(Path(folder), *case, f"x{INDEX_SUFFIX}") for case in INDICES.items()]
    if options.json:
        hostile.write_json(options.json, "files of 100 MB", results)


if __name__ == "__main__":
    main()

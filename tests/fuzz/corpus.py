"""The corpus of each fuzz target is one text file, corpus/TARGET.hex: an input a line, in
hexadecimal, sorted by length and bytes. wsm_fuzz_TARGET replays such a file as it is; libFuzzer
wants a folder with a file for each input, named by its SHA-1.

    python tests/fuzz/corpus.py unpack plan build/fuzz/seeds/plan
    python tests/fuzz/corpus.py pack plan build/fuzz/corpus/plan     adds the inputs in that folder

What libFuzzer found is large: let it keep only what reaches new edges (-merge=1) before packing.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def read(packed: Path) -> set[bytes]:
    return {bytes.fromhex(line) for line in packed.read_text().splitlines()}


def write(packed: Path, inputs: Iterable[bytes]) -> None:
    lines = [data.hex() for data in sorted(inputs, key=lambda data: (len(data), data))]
    packed.write_text("".join(f"{line}\n" for line in lines))


def unpack(packed: Path, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    inputs = read(packed)
    for data in inputs:
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)
    return len(inputs)


def pack(packed: Path, folder: Path) -> int:
    """Adds the files of the folder; how many inputs there are now."""
    inputs = read(packed) if packed.exists() else set()
    inputs |= {file.read_bytes() for file in folder.iterdir() if file.is_file()}
    write(packed, inputs)
    return len(inputs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["pack", "unpack"])
    parser.add_argument("target", help="plan, engine or ranges")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    act = pack if arguments.action == "pack" else unpack
    count = act(CORPUS / f"{arguments.target}.hex", arguments.folder)
    print(f"{arguments.target}: {count} inputs")


if __name__ == "__main__":
    main()

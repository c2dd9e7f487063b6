"""What spoils a checkpoint: sound headers, and what is done to their values and to their text."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
SIZES |= {"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8, "C64": 8}
NUMBERS: list[Any] = [-1, 0, 1, 3, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**62]
NUMBERS += [2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**64 + 4, -(2**63), 10**40, 10**5000]
NUMBERS += [0.0, -0.0, 1.5, 4.0, 1e308, float("nan"), float("inf")]
OTHERS: list[Any] = [None, True, False, "", "4", "F32", [], [4], {}, {"a": 1}, [[2]], [None]]
DTYPES: list[Any] = [*SIZES, "F4", "F6_E2M3", "F6_E3M2", "I4", "f32", "F33", "F32 ", "\0", "", 7]
NAMES = ["", ".", "..", "../a", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "\x1b[2J", "forward"]
NAMES += ["__metadata__", "__class__", "é", "e\u0301", "\u202eabc", "\ufffe", "😀", "a" * 70_000]
NAMES += ["a.b", "a.b.c", "weight", "0", "-", " ", "null", "self", "training"]
DEEP = [10, 126, 128, 1000, 100_000]

Spoil = Callable[[random.Random, "Header"], None]
SpoilText = Callable[[random.Random, bytes], bytes]
SpoilIndex = Callable[[random.Random, Any, Path], Any]


@dataclass
class Header:
    """Entries as (name, value), so that a name may occur twice, and the bytes behind them."""

    entries: list[tuple[str, Any]] = field(default_factory=list)
    data: bytes = b""

    def text(self) -> bytes:
        parts = (f"{json.dumps(name)}:{_dumps(value)}" for name, value in self.entries)
        return ("{" + ",".join(parts) + "}").encode("utf-8", "surrogatepass")

    def tensors(self) -> list[dict[str, Any]]:
        return [value for _, value in self.entries if isinstance(value, dict)]


def _dumps(value: Any) -> str:
    # Whole numbers beyond what Python turns into text by itself are none of JSON's concern.
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{_dumps(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dumps, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and value > 10**4000:
        return "1" + "0" * 5000
    return json.dumps(value)


def sound_header(rng: random.Random) -> Header:
    header = Header()
    end = 0
    names = rng.sample(["a", "b", "c", "x.y", "x.z", "q.0.w", "q.1.w", "long" * 20], 5)
    for name in names[: rng.randint(0, 5)]:
        dtype = rng.choice(list(SIZES))
        shape = [rng.randint(0, 5) if rng.random() < 0.2 else rng.randint(1, 9)]
        shape = [*shape, rng.randint(1, 7)] if rng.random() < 0.5 else shape
        shape = [] if rng.random() < 0.1 else shape
        size = SIZES[dtype]
        for dimension in shape:
            size *= dimension
        value = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        header.entries.append((name, value))
        end += size
    rng.shuffle(header.entries)
    if rng.random() < 0.3:
        header.entries.insert(0, ("__metadata__", {"format": "pt"}))
    header.data = rng.randbytes(end)
    return header


# -- values


def _any(rng: random.Random, values: list[Any]) -> Any:
    return copy.deepcopy(rng.choice(values))  # it may be spoiled further


def _tensor(rng: random.Random, header: Header) -> dict[str, Any]:
    return rng.choice(header.tensors() or [{}])


def spoil_number(rng: random.Random, header: Header) -> None:
    tensor = _tensor(rng, header)
    numbers = tensor.get(rng.choice(["shape", "data_offsets"]))
    if isinstance(numbers, list) and numbers:
        numbers[rng.randrange(len(numbers))] = _any(rng, NUMBERS + OTHERS)


def spoil_offset(rng: random.Random, header: Header) -> None:
    """A hole, an overlap, an end before its begin: a small step."""
    offsets = _tensor(rng, header).get("data_offsets")
    if isinstance(offsets, list) and offsets:
        at = rng.randrange(len(offsets))
        if isinstance(offsets[at], int):
            offsets[at] += rng.choice([-8, -4, -1, 1, 4, 8])


def shift_tensor(rng: random.Random, header: Header) -> None:
    offsets = _tensor(rng, header).get("data_offsets")
    if isinstance(offsets, list) and all(isinstance(o, int) for o in offsets):
        step = rng.choice([-4, 4, 2**32, 2**63])
        offsets[:] = [offset + step for offset in offsets]


def spoil_shape(rng: random.Random, header: Header) -> None:
    shapes: list[Any] = [[], [0], [2**32, 2**32], [2**63, 2], [2**64 - 1, 2**64 - 1, 0], [[2]]]
    shapes += [
        [0, 2**63],
        [0, 2**64],
        [2**62, 0, 2**62],
        [1] * 70,
        [1] * 5000,
        [-1, -4],
        {"0": 4},
        "4",
        4,
        None,
    ]
    _tensor(rng, header)["shape"] = _any(rng, shapes)


def reshape(rng: random.Random, header: Header) -> None:
    """The same number of bytes, said in another way."""
    shape = _tensor(rng, header).get("shape")
    if isinstance(shape, list):
        shape.insert(rng.randint(0, len(shape)), 1)


def spoil_dtype(rng: random.Random, header: Header) -> None:
    _tensor(rng, header)["dtype"] = _any(rng, DTYPES + OTHERS)


def spoil_field(rng: random.Random, header: Header) -> None:
    tensor = _tensor(rng, header)
    tensor[rng.choice(["dtype", "shape", "data_offsets"])] = _any(rng, NUMBERS + OTHERS)


def drop_field(rng: random.Random, header: Header) -> None:
    tensor = _tensor(rng, header)
    if tensor:
        del tensor[rng.choice(list(tensor))]


def add_field(rng: random.Random, header: Header) -> None:
    _tensor(rng, header)[rng.choice(["extra", "Shape", "data_offset"])] = _any(rng, OTHERS)


def rename(rng: random.Random, header: Header) -> None:
    if header.entries:
        at = rng.randrange(len(header.entries))
        header.entries[at] = (rng.choice(NAMES), header.entries[at][1])


def repeat(rng: random.Random, header: Header) -> None:
    """A name twice, or two names for the same bytes."""
    if header.entries:
        name, value = rng.choice(header.entries)
        other = name if rng.random() < 0.5 else f"{name}2"
        header.entries.append((other, copy.deepcopy(value)))


def spoil_metadata(rng: random.Random, header: Header) -> None:
    value: Any = _any(rng, [*OTHERS, {"k": 1}, {"k": None}, {"k": "v" * 10_000}, {"": "\0"}])
    header.entries.insert(rng.randint(0, len(header.entries)), ("__metadata__", value))


def nest(rng: random.Random, header: Header) -> None:
    """One value inside many lists. As text: Python's own writer would not go so deep."""
    header.entries.append(("deep", {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}))
    value: Any = 1
    for _ in range(rng.choice([3, 100])):
        value = [value]
    header.entries[-1][1][rng.choice(["shape", "data_offsets", "dtype", "more"])] = value


SPOILERS: list[Spoil] = [spoil_number, spoil_number, spoil_offset, spoil_offset, shift_tensor]
SPOILERS += [spoil_shape, reshape, spoil_dtype, spoil_field, drop_field, add_field, rename]
SPOILERS += [rename, repeat, spoil_metadata, nest]


# -- text


def flip(rng: random.Random, text: bytes) -> bytes:
    if not text:
        return text
    at = rng.randrange(len(text))
    return text[:at] + bytes([text[at] ^ (1 << rng.randrange(8))]) + text[at + 1 :]


def cut(rng: random.Random, text: bytes) -> bytes:
    begin = rng.randint(0, len(text))
    return text[:begin] + text[begin + rng.randint(1, 30) :]


def insert(rng: random.Random, text: bytes) -> bytes:
    pieces = [b"\0", b" " * 1000, b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\\ud800", b"\\u0000"]
    pieces += [b"{", b"}", b"[", b"]", b'"', b",", b":", b"/*x*/", b"NaN", b"-Infinity", b"1e999"]
    pieces += [b"9" * 5000, b"[" * rng.choice(DEEP), b'{"a":' * rng.choice(DEEP), rng.randbytes(9)]
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(pieces) + text[at:]


def repeat_part(rng: random.Random, text: bytes) -> bytes:
    begin = rng.randint(0, len(text))
    part = text[begin : begin + rng.randint(1, 200)]
    return text[:begin] + part + text[begin:]


def pad(rng: random.Random, text: bytes) -> bytes:
    return (
        rng.choice([b"", b" ", b"\n", b"\xef\xbb\xbf", b"\0"])
        + text
        + rng.choice([b"", b" " * 9, b"\0", b"x", b"{}", b"\n"])
    )


def replace_all(rng: random.Random, text: bytes) -> bytes:
    whole = [b"", b"{}", b"[]", b"null", b"1", b'"', b"{", b'{"a":{}}', b"{}" * 3, b"\x80\x04."]
    whole += [rng.randbytes(rng.randint(1, 3000)), b"[" * 200_000, b'{"weight_map":{}}']
    return rng.choice(whole)


TEXT_SPOILERS: list[SpoilText] = [flip, flip, cut, insert, insert, repeat_part, pad, replace_all]


# -- indices

FILES: list[Any] = ["1.safetensors", "2.safetensors", "sub/3.safetensors", "./2.safetensors"]
FILES += ["link.safetensors", "loop.safetensors", "folder.safetensors", "pipe.safetensors"]
FILES += ["../outside.safetensors", "sub/../../outside.safetensors", "sub/..", "..", ".", "", "/"]
FILES += ["..\\outside.safetensors", "C:\\x.safetensors", "\\\\host\\x.safetensors", "none/x"]
FILES += ["a\0.safetensors", "1.safetensors\0", "x\n.safetensors", "\x1b[2J.safetensors"]
FILES += ["~/x.safetensors", "$HOME/x.safetensors", "‥/outside.safetensors", "．．/x.safetensors"]
FILES += ["\u202e1.safetensors", "\ud800.safetensors", "n" * 300 + ".safetensors", "1.safetensors/"]
FILES += ["d/" * 3000 + "x.safetensors", "pytorch_model.bin", "1.SAFETENSORS", "gone.safetensors"]


def spoil_file(rng: random.Random, content: Any, folder: Path) -> Any:
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        weight_map = content["weight_map"]
        absolute = [str(folder / "1.safetensors"), str(folder.parent / "outside.safetensors")]
        name = rng.choice([*weight_map, *NAMES])
        weight_map[name] = _any(rng, FILES * 2 + absolute + OTHERS + [7, 1.5])
    return content


def drop_entry(rng: random.Random, content: Any, folder: Path) -> Any:
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        names = list(content["weight_map"])
        if names:
            del content["weight_map"][rng.choice(names)]
    return content


def spoil_top(rng: random.Random, content: Any, folder: Path) -> Any:
    if isinstance(content, dict):
        content[rng.choice(["weight_map", "metadata", "more"])] = _any(rng, OTHERS)
    return content


def wrap(rng: random.Random, content: Any, folder: Path) -> Any:
    return rng.choice([[content], {"weight_map": content}, {"index": content}])


INDEX_SPOILERS: list[SpoilIndex] = [spoil_file, spoil_file, spoil_file, drop_entry, spoil_top, wrap]

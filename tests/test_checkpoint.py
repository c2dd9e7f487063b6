"""Headers to tensor images: offsets, dtypes, folders, and what is refused."""

import json
import os
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wsm_ext.checkpoints import header as headers
from wsm_ext.checkpoints.checkpoint import Checkpoint
from wsm_ext.checkpoints.image import CheckpointError, Extent, TensorImage, assemble
from wsm_ext.checkpoints.index import MAX_INDEX_BYTES

INDEX = "model.safetensors.index.json"


def write_raw(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_index(folder: Path, weight_map: object, name: str = INDEX) -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    image = checkpoint.tensors[name]
    data = bytearray(image.nbytes)
    for extent in image.extents:
        with open(checkpoint.shards[extent.shard], "rb") as stream:
            stream.seek(extent.offset)
            end = extent.tensor_offset + extent.nbytes
            data[extent.tensor_offset : end] = stream.read(extent.nbytes)
    return torch.frombuffer(data, dtype=image.dtype).reshape(image.shape)


@pytest.fixture
def shards(tmp_path):
    """Two shards of one checkpoint: a, b in the first, c in the second."""
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.arange(5, dtype=torch.bfloat16),
        "c": torch.arange(7, dtype=torch.int8),
    }
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": tensors["a"], "b": tensors["b"]}, folder / "x-1.safetensors")
    save_file({"c": tensors["c"]}, folder / "x-2.safetensors")
    return folder, tensors


FILES = {"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"}


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].name == name
        got = read(checkpoint, name)
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)


# What is read


def test_one_file(shards):
    folder, tensors = shards
    checkpoint = Checkpoint.open(str(folder / "x-1.safetensors"))
    assert_holds(checkpoint, {"a": tensors["a"], "b": tensors["b"]})
    assert checkpoint.shards == [(folder / "x-1.safetensors").resolve()]


def test_folder_without_index(shards):
    folder, tensors = shards
    (folder / "._x-1.safetensors").write_bytes(b"resource fork")
    checkpoint = Checkpoint.open(folder)
    assert_holds(checkpoint, tensors)
    assert [s.name for s in checkpoint.shards] == ["x-1.safetensors", "x-2.safetensors"]


def test_list_of_files(shards):
    folder, tensors = shards
    checkpoint = Checkpoint.open([folder / "x-2.safetensors", str(folder / "x-1.safetensors")])
    assert_holds(checkpoint, tensors)
    assert [s.name for s in checkpoint.shards] == ["x-2.safetensors", "x-1.safetensors"]


@pytest.mark.parametrize("name", [INDEX, "diffusion_pytorch_model.safetensors.index.json"])
@pytest.mark.parametrize("given", ["folder", "index"])
def test_index(shards, name, given):
    folder, tensors = shards
    index = write_index(folder, FILES, name)
    write_raw(folder / "adapter.safetensors", {"other": entry("U8", [1], 0, 1)}, b"0")
    assert_holds(Checkpoint.open(folder if given == "folder" else index), tensors)


def test_the_model_index_goes_before_others(shards):
    folder, tensors = shards
    write_index(folder, FILES)
    write_index(folder, {"a": "x-1.safetensors"}, "vae.safetensors.index.json")
    assert_holds(Checkpoint.open(folder), tensors)


def test_shards_in_a_subfolder(shards):
    folder, tensors = shards
    (folder / "deep").mkdir()
    (folder / "x-2.safetensors").rename(folder / "deep" / "x-2.safetensors")
    write_index(folder, FILES | {"c": "deep/x-2.safetensors"})
    assert_holds(Checkpoint.open(folder), tensors)


def test_symbolic_links_are_followed(shards, tmp_path):
    folder, tensors = shards
    index = write_index(folder, FILES)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in (folder / "x-1.safetensors", folder / "x-2.safetensors", index):
        blob = tmp_path / f"blob-{file.stem}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    checkpoint = Checkpoint.open(snapshot)
    assert_holds(checkpoint, tensors)
    assert [s.name for s in checkpoint.shards] == ["blob-x-1", "blob-x-2"]


def test_model_safetensors_goes_first_with_a_warning(shards):
    folder, tensors = shards
    write_index(folder, FILES)
    save_file({"d": tensors["c"]}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"model.safetensors is used, .*x-1.safetensors") as seen:
        checkpoint = Checkpoint.open(folder)
    assert_holds(checkpoint, {"d": tensors["c"]})
    assert seen[0].filename == __file__


def test_model_safetensors_alone_gives_no_warning(shards, tmp_path):
    _, tensors = shards
    save_file(tensors, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(Checkpoint.open(tmp_path), tensors)


def test_tensors_that_the_index_does_not_list_are_left_out_with_a_warning(shards):
    folder, tensors = shards
    write_index(folder, {"b": "x-1.safetensors", "c": "x-2.safetensors"})
    with pytest.warns(UserWarning, match="does not list 1 tensors .*'a'"):
        checkpoint = Checkpoint.open(folder)
    assert_holds(checkpoint, {"b": tensors["b"], "c": tensors["c"]})


def test_the_index_decides_between_two_shards_with_one_name(shards):
    folder, tensors = shards
    save_file({"a": tensors["a"] + 1, "c": tensors["c"]}, folder / "x-2.safetensors")
    write_index(folder, FILES)
    assert_holds(Checkpoint.open(folder), tensors)


def test_offsets_follow_file_order_and_may_be_odd(tmp_path):
    data = bytes(range(12))
    header = {  # neither in name order nor in the header's order
        "zz": entry("U8", [3], 0, 3),
        "mm": entry("F32", [], 8, 12),
        "aa": entry("I8", [5, 1], 3, 8),
        "empty": entry("F64", [0, 4], 8, 8),
    }
    text = json.dumps(header).encode() + b"   "
    checkpoint = Checkpoint.open(write_raw(tmp_path / "x.safetensors", text, data))
    base = 8 + len(text)
    extents = {name: image.extents for name, image in checkpoint.tensors.items()}
    assert extents == {
        "zz": (Extent(0, base, 3),),
        "aa": (Extent(0, base + 3, 5),),
        "empty": (),
        "mm": (Extent(0, base + 8, 4),),
    }
    assert checkpoint.tensors["mm"].shape == ()
    assert checkpoint.tensors["empty"].nbytes == 0
    assert bytes(read(checkpoint, "aa").flatten().tolist()) == data[3:8]


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        ("BOOL", torch.bool),
        ("U8", torch.uint8),
        ("I8", torch.int8),
        ("U16", torch.uint16),
        ("I16", torch.int16),
        ("U32", torch.uint32),
        ("I32", torch.int32),
        ("U64", torch.uint64),
        ("I64", torch.int64),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E5M2FNUZ", torch.float8_e5m2fnuz),
        ("F8_E8M0", torch.float8_e8m0fnu),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F32", torch.float32),
        ("F64", torch.float64),
        ("C64", torch.complex64),
    ],
)
def test_dtypes(tmp_path, code, dtype):
    size = 3 * dtype.itemsize
    path = write_raw(tmp_path / "x.safetensors", {"t": entry(code, [3], 0, size)}, b"\1" * size)
    image = Checkpoint.open(path).tensors["t"]
    assert (image.dtype, image.shape, image.nbytes) == (dtype, (3,), size)


def test_metadata_of_the_headers_is_kept(tmp_path):
    tensor = torch.zeros(1)
    save_file({"a": tensor}, tmp_path / "1.safetensors", metadata={"format": "pt", "k": "1"})
    save_file({"b": tensor}, tmp_path / "2.safetensors", metadata={"k": "2", "l": "3"})
    assert Checkpoint.open(tmp_path).metadata == {"format": "pt", "k": "1", "l": "3"}


def test_a_thousand_shards_leave_no_handle_and_no_mapping(tmp_path):
    header = json.dumps({"t": entry("U8", [1], 0, 1)}).encode()
    for number in range(1000):
        name = f"model-{number:05}.safetensors"
        write_raw(tmp_path / name, header.replace(b'"t"', b'"t%d"' % number), b"x")
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.shards) == len(checkpoint.tensors) == 1000
    assert checkpoint.tensors["t999"].extents[0].shard == 999
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_weights_are_neither_read_nor_mapped(tmp_path, monkeypatch):
    text = json.dumps({"t": entry("U8", [1 << 40], 0, 1 << 40)}).encode()
    path = write_raw(tmp_path / "x.safetensors", text)
    try:
        os.truncate(path, 8 + len(text) + (1 << 40))  # sparse: larger than any machine's memory
    except OSError:
        pytest.skip("the file system has no sparse files of 1 TiB")
    mapped = []
    real_open = headers.safe_open

    class Watched:
        def __init__(self, *args, **options):
            self._open = real_open(*args, **options)

        def __enter__(self):
            header = self._open.__enter__()
            mapped.append(str(path) in Path("/proc/self/maps").read_text())
            return header

        def __exit__(self, *error):
            return self._open.__exit__(*error)

    monkeypatch.setattr(headers, "safe_open", Watched)
    assert Checkpoint.open(path).tensors["t"].nbytes == 1 << 40
    assert mapped == [False]


# What is refused


def refuse(source, *parts: str) -> None:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(source)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
def test_types_below_a_byte_are_refused_by_name(tmp_path, code):
    size = 2 if code == "F4" else 3
    path = write_raw(tmp_path / "x.safetensors", {"t.w": entry(code, [4], 0, size)}, b"0" * size)
    refuse(path, str(path), "'t.w'", code, "smaller than a byte")


def test_a_dtype_that_torch_lacks_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(headers.TORCH_NAMES, "F8_E8M0", "float8_of_the_future")
    path = write_raw(tmp_path / "x.safetensors", {"t.w": entry("F8_E8M0", [1], 0, 1)}, b"0")
    refuse(path, str(path), "'t.w'", "F8_E8M0", "torch")


U8 = entry("U8", [4], 0, 4)
ATTACKS = {
    "no bytes at all": b"",
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header length near 2^64": struct.pack("<Q", 2**64 - 8) + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"abcd",
    "a hole": ({"a": U8, "b": entry("U8", [4], 5, 9)}, 9),
    "an overlap": ({"a": U8, "b": entry("U8", [4], 2, 6)}, 6),
    "bytes after the end": ({"a": U8}, 5),
    "bytes missing": ({"a": U8}, 3),
    "shape against offsets": ({"a": entry("U8", [5], 0, 4)}, 4),
    "shape that overflows": ({"a": entry("U8", [2**40, 2**40], 0, 4)}, 4),
    "offsets reversed": ({"a": entry("U8", [4], 4, 0)}, 4),
    "negative shape": ({"a": entry("U8", [-4], 0, 4)}, 4),
    "unknown dtype": ({"a": entry("I4", [4], 0, 4)}, 4),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_malformed_files_are_refused_naming_the_file(tmp_path, attack):
    path = tmp_path / "x.safetensors"
    if isinstance(attack, bytes):
        path.write_bytes(attack)
    else:
        write_raw(path, attack[0], b"0" * attack[1])
    refuse(path, str(path), "download it again")


def test_a_sum_that_misses_the_file_size_is_refused(tmp_path, monkeypatch):
    path = write_raw(tmp_path / "x.safetensors", {"a": U8}, b"0000")
    monkeypatch.setattr(headers, "file_size", lambda file: path.stat().st_size + 1)
    refuse(path, str(path), "its header describes")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused(tmp_path, name):
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    refuse(tmp_path / name, name, "pickle", "convert it to safetensors")
    refuse(tmp_path, "no *.safetensors file", name, "convert")


def test_paths_that_are_no_checkpoint(tmp_path):
    refuse(tmp_path / "none.safetensors", "none.safetensors", "check the path")
    refuse(tmp_path, str(tmp_path), "no *.safetensors file")
    refuse([], "empty")
    refuse("", "empty")
    refuse([tmp_path], str(tmp_path), "not a regular file")
    refuse("a\0b", "cannot be opened")


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    refuse(tmp_path, "not a regular file")


def test_a_tensor_in_two_shards_is_refused_naming_both(shards):
    folder, tensors = shards
    save_file({"b": tensors["b"]}, folder / "x-2.safetensors")
    refuse(folder, "'b'", "x-1.safetensors", "x-2.safetensors")
    refuse([folder / "x-1.safetensors"] * 2, "'a'", "x-1.safetensors")


def test_an_empty_tensor_in_two_shards_is_refused_naming_both(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"e": torch.zeros(0)}, tmp_path / name)
    refuse(tmp_path, "'e'", "1.safetensors", "2.safetensors")


def test_a_missing_shard_is_named_with_its_tensors(shards):
    folder, _ = shards
    write_index(folder, FILES)
    (folder / "x-2.safetensors").unlink()
    refuse(folder, str(folder / "x-2.safetensors"), "is missing", "'c'")
    (folder / "x-2.safetensors").symlink_to(folder / "gone")
    refuse(folder, str(folder / "x-2.safetensors"), "is missing", "'c'")


def test_a_name_that_its_shard_lacks_is_refused(shards):
    folder, _ = shards
    write_index(folder, FILES | {"d": "x-2.safetensors"})
    refuse(folder, "x-2.safetensors", "'d'", INDEX)


def test_names_that_the_system_refuses_are_refused_naming_the_file(shards):
    folder, _ = shards
    long = "n" * 300 + ".safetensors"
    write_index(folder, FILES | {"c": long})
    refuse(folder, long, "cannot be opened")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    write_index(folder, FILES | {"c": "loop.safetensors"})
    refuse(folder, "loop.safetensors", "cannot be opened")
    refuse("d" * 5000, "cannot be opened")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    def refused(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", refused)
    refuse(tmp_path, str(tmp_path), "cannot be listed")


@pytest.mark.parametrize("shape", [[0, 2**63], [2**62, 0, 2**62]])
def test_empty_shapes_that_torch_cannot_count_are_refused(tmp_path, shape):
    path = write_raw(tmp_path / "x.safetensors", {"a": entry("U8", shape, 0, 0)})
    refuse(path, "x.safetensors", "'a'", "cannot count")


def test_more_dimensions_than_any_tensor_has_are_refused(tmp_path):
    header = {"a": entry("U8", [1] * 65, 0, 1)}
    refuse(write_raw(tmp_path / "x.safetensors", header, b"0"), "x.safetensors", "65 dimensions")


def test_several_indices_of_other_names_are_refused(shards):
    folder, _ = shards
    write_index(folder, FILES, "one.safetensors.index.json")
    write_index(folder, FILES, "two.safetensors.index.json")
    refuse(folder, "one.safetensors.index.json", "two.safetensors.index.json", "give the one")


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("../x.safetensors", "leaves the folder"),
        ("sub/../../x.safetensors", "leaves the folder"),
        ("sub/..", "leaves the folder"),
        ("..\\x.safetensors", "leaves the folder"),
        ("/etc/x.safetensors", "is absolute"),
        ("C:\\x.safetensors", "is absolute"),
        ("", "is not a file name"),
        (".", "is not a file name"),
        ("a\0.safetensors", "is not a file name"),
        ("\x1b[2J.safetensors", "is not a file name"),
        ("\u202ea.safetensors", "is not a file name"),
        ("\ud800.safetensors", "is not a file name"),
        ("pytorch_model.bin", "convert"),
        (7, "not a name"),
        (None, "not a name"),
        (["x-1.safetensors"], "not a name"),
    ],
)
def test_index_entries_that_are_refused(shards, file, why):
    folder, tensors = shards
    save_file({"c": tensors["c"]}, folder.parent / "x.safetensors")
    index = write_index(folder, FILES | {"c": file})
    refuse(folder, str(index), "'c'", why)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "not valid JSON"),
        (b'{"weight_map": {"a": "x-1.safetensors"', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"n": ' + b"9" * 10_000 + b"}", ""),
        (b'{"weight_map": {"a": "x-1.safetensors", "a": "x-2.safetensors"}}', "'a' occurs twice"),
        (b'{"weight_map": {}, "weight_map": {}}', "'weight_map' occurs twice"),
        (b"{}", "no object 'weight_map'"),
        (b"[]", "no object 'weight_map'"),
        (b"null", "no object 'weight_map'"),
        (b'{"weight_map": ["a"]}', "no object 'weight_map'"),
        (b'{"weight_map": {}}', "lists no tensors"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_malformed_indices_are_refused(shards, text, why):
    folder, _ = shards
    (folder / INDEX).write_bytes(text)
    refuse(folder, str(folder / INDEX), why)


def test_an_index_that_is_too_large_is_not_read(shards):
    folder, _ = shards
    index = write_index(folder, FILES)
    os.truncate(index, MAX_INDEX_BYTES + 1)  # sparse
    refuse(folder, str(index), "too large for an index")


# Assembled images


def image(name, shape, *extents, dtype=torch.bfloat16):
    return TensorImage(name, dtype, shape, extents)


def test_assemble_lays_parts_one_after_the_other():
    first = image("e.0", (2, 3), Extent(0, 100, 12))
    second = image("e.1", (2, 3), Extent(1, 50, 8), Extent(2, 7, 4, 8))
    fused = assemble("e", [first, second], [2, 2, 3])
    assert fused == TensorImage(
        "e",
        torch.bfloat16,
        (2, 2, 3),
        (Extent(0, 100, 12), Extent(1, 50, 8, 12), Extent(2, 7, 4, 20)),
    )
    assert fused.nbytes == 24


def test_assembled_bytes_are_those_of_the_parts(shards):
    folder, tensors = shards
    save_file({"d": tensors["a"] + 9}, folder / "x-3.safetensors")
    checkpoint = Checkpoint.open(folder)
    parts = [checkpoint.tensors["d"], checkpoint.tensors["a"]]
    checkpoint.tensors["stacked"] = assemble("stacked", parts, (2, 2, 3))
    expected = torch.stack([tensors["a"] + 9, tensors["a"]])
    assert torch.equal(read(checkpoint, "stacked"), expected)


def test_assemble_takes_empty_parts():
    empty, part = image("e.0", (0, 3)), image("e.1", (1, 3), Extent(1, 50, 6))
    assert assemble("e", [empty, part], (1, 3)).extents == (Extent(1, 50, 6),)


@pytest.mark.parametrize(
    ("parts", "shape", "why"),
    [
        ([], (0,), "no tensors"),
        ([image("p", (4,), Extent(0, 0, 8))], (5,), "needs 10 bytes"),
        (
            [
                image("p", (4,), Extent(0, 0, 8)),
                image("q", (4,), Extent(0, 8, 8), dtype=torch.float16),
            ],
            (8,),
            "'q' is torch.float16",
        ),
    ],
)
def test_assemble_refuses_what_does_not_fit(parts, shape, why):
    with pytest.raises(CheckpointError, match="'fused'.*" + why):
        assemble("fused", parts, shape)

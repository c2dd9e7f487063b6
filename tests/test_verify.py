"""`wsm verify`: the sidecar's life, what differs from it, and how the files are read."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from waits import LIMIT_S

from wsm_ext import _engine
from wsm_ext.checkpoints import bulk_reads, hashes
from wsm_ext.checkpoints.checkpoint import Checkpoint
from wsm_ext.checkpoints.hashes import (
    SIDECAR,
    ByteRun,
    ExtentToHash,
    Recorded,
    hash_extents,
    read_sidecar,
    write_sidecar,
)
from wsm_ext.checkpoints.image import CheckpointError, assemble
from wsm_ext.checkpoints.verify import verify
from wsm_ext.commands import cli
from wsm_ext.hf.synthetic import make_llama_checkpoint


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "a": torch.randn(33, 7),
        "b.weight": torch.randn(64, 64).to(torch.bfloat16),
        "nothing": torch.empty(0, 4),
        "one": torch.tensor(3, dtype=torch.int64),
        "z": torch.randint(0, 200, (12345,), dtype=torch.uint8),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return split(tmp_path / "model", tensors())


def split(folder: Path, content: dict[str, torch.Tensor], shards: int = 2) -> Path:
    folder.mkdir()
    for shard in range(shards):
        part = {name: content[name] for name in sorted(content)[shard::shards]}
        save_file(part, folder / f"part-{shard}.safetensors")
    return folder


def flip(checkpoint: Checkpoint, name: str, at: int) -> None:
    """Turn one bit of a tensor's byte (from the end, where negative) in its file."""
    [extent] = checkpoint.tensors[name].extents
    with open(checkpoint.shards[extent.shard], "r+b") as file:
        file.seek(extent.offset + at % extent.nbytes)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def run(folder: Path, capsys: Any, *options: str) -> tuple[int, str, dict[str, Any]]:
    out = folder.parent / "out.json"
    out.unlink(missing_ok=True)
    status = cli.main(["verify", str(folder), "--json", str(out), *options])
    found = json.loads(out.read_text())["verify"] if out.exists() else {}
    captured = capsys.readouterr()
    return status, captured.out + captured.err, found


# -- the sidecar's life ----------------------------------------------------------------------------


def test_the_first_run_writes_the_second_compares(folder: Path, capsys: Any) -> None:
    status, said, found = run(folder, capsys)
    assert (status, found["wrote"], found["equal"], found["tensors"]) == (0, True, True, 5)
    assert "wrote the hashes of 5 tensors" in said
    assert str(folder / SIDECAR) in said.replace("\n", "")
    recorded = read_sidecar(folder / SIDECAR)
    for name, tensor in tensors().items():
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        digest = xxhash.xxh3_128(data).hexdigest()
        assert recorded[name] == Recorded(tensor.dtype, tuple(tensor.shape), digest)
    before = (folder / SIDECAR).read_bytes()
    status, said, found = run(folder, capsys)
    assert (status, found["wrote"], found["equal"]) == (0, False, True)
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors().values())
    assert "equal: 5 tensors" in said
    assert (folder / SIDECAR).read_bytes() == before
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("at", [0, -1, 77])
@pytest.mark.parametrize("name", ["a", "b.weight", "z"])
def test_a_flipped_bit_is_found_and_named(folder: Path, capsys: Any, name: str, at: int) -> None:
    run(folder, capsys)
    before = (folder / SIDECAR).read_bytes()
    flip(Checkpoint.open(folder), name, at)
    status, said, found = run(folder, capsys)
    assert status == 1
    assert (found["differ"], found["changed"], found["missing"], found["new"]) == (
        [name],
        [],
        [],
        [],
    )
    assert f"DIFFERS  {name!r}" in said
    assert "offset" in found["details"][name]
    assert (folder / SIDECAR).read_bytes() == before  # never by itself
    assert run(folder, capsys, "--update")[0] == 0
    assert (folder / SIDECAR).read_bytes() != before
    assert run(folder, capsys)[0] == 0


def test_other_shards_of_equal_tensors_are_no_difference(folder: Path, capsys: Any) -> None:
    run(folder, capsys)
    other = split(folder.parent / "other", tensors(), shards=1)
    os.rename(folder / SIDECAR, other / SIDECAR)
    assert run(other, capsys)[0] == 0


def test_of_many_differences_the_first_are_shown(folder: Path, capsys: Any) -> None:
    run(folder, capsys)
    content = tensors() | {f"new{i:02}": torch.zeros(1) for i in range(22)}
    other = split(folder.parent / "other", content)
    _, said, found = run(other, capsys, "--sidecar", str(folder / SIDECAR))
    assert len(found["new"]) == 22
    assert said.count("NEW      'new") == 20
    assert "NEW      and 2 more (--json lists all)" in said


def test_all_kinds_of_differences_are_told_apart(folder: Path, capsys: Any) -> None:
    run(folder, capsys)
    content = tensors()
    content["a"] = content["a"].T.contiguous()
    content["one"] = content["one"].to(torch.int32)
    content["extra"] = content.pop("nothing")
    content["z"][5] += 1
    other = split(folder.parent / "other", content)
    status, said, found = run(other, capsys, "--sidecar", str(folder / SIDECAR))
    assert status == 1
    assert (found["differ"], found["changed"]) == (["z"], ["a", "one"])
    assert (found["missing"], found["new"]) == (["nothing"], ["extra"])
    assert "float32 [33, 7] was recorded, the file has float32 [7, 33]" in said
    for kind in ("DIFFERS", "CHANGED", "MISSING", "NEW"):
        assert kind in said


def test_a_file_has_its_sidecar_beside_it_and_a_list_none(folder: Path, capsys: Any) -> None:
    file = folder / "part-0.safetensors"
    assert cli.main(["verify", str(file)]) == 0
    assert (folder / f"part-0.safetensors.{SIDECAR}").is_file()
    with pytest.raises(CheckpointError, match="name the sidecar"):
        verify(Checkpoint.open([file]))
    assert verify(Checkpoint.open([file]), folder / f"{file.name}.{SIDECAR}").equal


def test_tensors_that_were_put_together_are_refused(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    parts = [checkpoint.tensors["b.weight"]] * 2
    checkpoint.tensors["both"] = assemble("both", parts, (128, 64))
    with pytest.raises(CheckpointError, match="'both' is made of tensors"):
        verify(checkpoint)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    folder: Path, monkeypatch: Any
) -> None:
    path = folder / SIDECAR
    write_sidecar(path, {"a": Recorded(torch.float32, (1,), "0" * 32)})
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="no space"):
        verify(Checkpoint.open(folder), update=True)
    assert path.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [
        "part-0.safetensors",
        "part-1.safetensors",
        SIDECAR,
    ]


def test_a_place_that_cannot_be_written_is_an_error_before_reading(
    folder: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(hashes, "read_all", None)
    for path in (folder, folder / "gone" / "hashes.json"):
        with pytest.raises(CheckpointError, match="--sidecar FILE"):
            verify(Checkpoint.open(folder), path, update=True)


# -- sidecars that are none ------------------------------------------------------------------------

GOOD = {"dtype": "float32", "shape": [33, 7], "hash": "0" * 32}
HEAD = {"format": "wsm-hashes", "version": 1, "hash": "xxh3_128"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"format": "wsm-hashes", "format": 1}', "occurs twice"),
        (b"\xff\xfe", "not valid JSON"),
        ([], "not a sidecar"),
        ({"weight_map": {}}, "not a sidecar"),
        ({**HEAD, "version": 2}, "version is 2"),
        ({**HEAD, "version": True}, "version is True"),
        ({**HEAD, "hash": "md5"}, "hash is 'md5'"),
        (HEAD, "lists no tensors"),
        ({**HEAD, "tensors": []}, "lists no tensors"),
        ({**HEAD, "tensors": {"a": 1}}, "'a' is"),
        ({**HEAD, "tensors": {"a": {**GOOD, "dtype": "_inductor"}}}, "'a' is"),
        ({**HEAD, "tensors": {"a": {**GOOD, "dtype": ["float32"]}}}, "'a' is"),
        ({**HEAD, "tensors": {"a": {**GOOD, "shape": [-1]}}}, "'a' is"),
        ({**HEAD, "tensors": {"a": {**GOOD, "shape": [True]}}}, "'a' is"),
        ({**HEAD, "tensors": {"a": {**GOOD, "shape": [2**70]}}}, "'a' is"),
        ({**HEAD, "tensors": {"a": {**GOOD, "hash": "0" * 31 + "G"}}}, "'a' is"),
        ({**HEAD, "tensors": {"a": {**GOOD, "hash": 0}}}, "'a' is"),
        ({**HEAD, "tensors": {"other": GOOD}}, "of another model"),
    ],
)
def test_a_bad_sidecar_is_an_error_that_names_it(
    folder: Path, content: Any, message: str, capsys: Any
) -> None:
    path = folder / SIDECAR
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    status, said, _ = run(folder, capsys)
    assert status == 2
    assert message in said
    assert path.read_bytes() == content


def test_other_things_in_place_of_a_sidecar(folder: Path, monkeypatch: Any) -> None:
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="not a regular file"):
        verify(checkpoint, folder)
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match="not a regular file"):
        verify(checkpoint, pipe)
    verify(checkpoint)
    monkeypatch.setattr(hashes, "MAX_SIDECAR_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"too large for a sidecar \(limit: 100 bytes"):
        verify(checkpoint)


def test_without_the_package_the_error_says_what_to_install(
    folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    status, said, _ = run(folder, capsys)
    assert status == 2
    assert "pip install xxhash" in said


def test_a_command_that_streams_checks_by_the_sidecar(tmp_path: Path, capsys: Any) -> None:
    size = {"layers": 4, "hidden": 64, "intermediate": 96, "heads": 2, "kv_heads": 2, "vocab": 64}
    folder = make_llama_checkpoint(tmp_path / "model", shards=1, **size)
    given = ["prefill", str(folder), "--tokens", "2", "--repeat", "1", "--device", "cpu"]
    given += ["--no-measure", "--device-memory", "8MiB", "--host-memory", "1MiB", "--verify"]
    assert cli.main(given) == 2
    assert f"`wsm verify {folder}` makes them" in capsys.readouterr().err
    assert cli.main(["verify", str(folder)]) == 0
    out = tmp_path / "prefill.json"
    assert cli.main([*given, "--json", str(out)]) == 0
    verified = json.loads(out.read_text())["stats"]["verified"]
    checkpoint = Checkpoint.open(folder)
    assert verified["bytes"] == sum(image.nbytes for image in checkpoint.tensors.values())
    flip(checkpoint, "model.layers.2.mlp.up_proj.weight", 9)
    assert cli.main(given) == 2
    assert "model.layers.2.mlp.up_proj.weight" in capsys.readouterr().err


# -- how files are read ----------------------------------------------------------------------------


def refuse_direct(monkeypatch: Any, where: str) -> None:
    """As file systems do, at open or at the first read."""
    real_open, real_preadv = os.open, os.preadv
    direct: set[int] = set()

    def opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = real_open(path, flags, *rest, **options)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def preadv(fd: int, *rest: Any) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(fd, *rest)

    monkeypatch.setattr(bulk_reads.os, "open", opened)
    monkeypatch.setattr(bulk_reads.os, "preadv", preadv)


@pytest.mark.parametrize("refused", ["", "open", "read"])
@pytest.mark.parametrize("block", [1 << 13, 4 << 20])
def test_any_stretch_is_read_whole_in_blocks(
    tmp_path: Path, monkeypatch: Any, block: int, refused: str
) -> None:
    data = torch.randint(0, 256, (70_001,), dtype=torch.uint8).numpy().tobytes()
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(data)
    monkeypatch.setattr(bulk_reads, "BLOCK_BYTES", block)
    if refused:
        refuse_direct(monkeypatch, refused)
    spans = [(0, 0, 70_001), (1, 1, 1), (0, 4095, 2), (1, 8191, 61_810), (0, 70_000, 1)]
    runs = (
        (ByteRun(0, 1), ByteRun(5, 30_000), ByteRun(40_000, 1)),
        (ByteRun(61_000, 800),),
    )
    extents = [ExtentToHash(*span, shares=runs if span[2] > 60_000 else ()) for span in spans]
    seen: list[int] = []
    found = hash_extents(files, extents, seen.append)
    for extent, got in zip(extents, found, strict=True):
        whole = data[extent.offset : extent.offset + extent.nbytes]
        assert got.digest == xxhash.xxh3_128(whole).hexdigest()
        assert got.shares == [
            xxhash.xxh3_128(b"".join(whole[run.offset : run.end] for run in part)).hexdigest()
            for part in extent.shares
        ]
    assert seen[-1] == sum(extent.nbytes for extent in extents)


@pytest.mark.parametrize("refused", ["", "open"])
@pytest.mark.parametrize("cached", [False, True])
def test_the_page_cache_is_left_as_it_was(
    folder: Path, monkeypatch: Any, refused: str, cached: bool
) -> None:
    file = folder / "part-0.safetensors"
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    size = file.stat().st_size
    if _engine.in_page_cache(fd, 0, size):
        pytest.skip("files of this folder always lie in memory")
    if cached:
        file.read_bytes()
    if refused:
        refuse_direct(monkeypatch, refused)
    last = size - 4096
    extents = [ExtentToHash(0, last, size - last)]
    found = hash_extents([file], extents)
    assert _engine.in_page_cache(fd, last, size - last) == cached
    assert found[0].digest == xxhash.xxh3_128(file.read_bytes()[last:]).hexdigest()
    os.close(fd)


def test_a_failed_read_names_file_and_offset(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(bulk_reads.os, "preadv", fail)
    status, said, _ = run(folder, capsys)
    assert status == 2
    assert "Input/output error: " in said
    assert ".safetensors, offset " in said
    assert not (folder / SIDECAR).exists()


def test_a_file_that_ends_early_or_changes_is_an_error(folder: Path, monkeypatch: Any) -> None:
    checkpoint = Checkpoint.open(folder)
    shard = checkpoint.shards[0]
    content = shard.read_bytes()
    os.truncate(shard, len(content) - 1)
    with pytest.raises(OSError, match="ends at offset"):
        verify(checkpoint)
    shard.write_bytes(content)
    real = hashes._hash_extent

    def touching(extent: ExtentToHash, blocks: Any) -> Any:
        os.utime(shard, ns=(1, 1))
        return real(extent, blocks)

    monkeypatch.setattr(hashes, "_hash_extent", touching)
    with pytest.raises(OSError, match="was changed while it was read"):
        verify(checkpoint)


def test_a_read_that_never_ends_is_a_timeout(folder: Path, monkeypatch: Any) -> None:
    ended = threading.Event()

    def hang(*_: object) -> int:
        ended.wait(LIMIT_S)
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(bulk_reads.os, "preadv", hang)
    checkpoint = Checkpoint.open(folder)
    others = set(threading.enumerate())
    extents = [ExtentToHash(0, checkpoint.tensors["a"].extents[0].offset, 8)]
    with pytest.raises(TimeoutError, match="offset"):
        bulk_reads.read_all(checkpoint.shards, extents, hashes._hash_extent, patience_s=0.2)
    ended.set()
    for thread in set(threading.enumerate()) - others:
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def test_real_tensors_come_back_from_the_files_hashed(folder: Path) -> None:
    """The hashes are those of what safetensors itself reads."""
    verify(Checkpoint.open(folder))
    recorded = read_sidecar(folder / SIDECAR)
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            assert recorded[name].digest == xxhash.xxh3_128(data).hexdigest()

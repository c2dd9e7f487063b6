"""Files that change while they are streamed, and files that are not what they seem: an error that
names the file and says what happened; never stale bits, never a hang, never a signal."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens
from torch import nn

import wsm_ext as wsm

MIB = 1 << 20
LAYERS = 6
STREAMED: dict[str, Any] = {"device": "cpu", "device_memory": 24 * MIB, "host_memory": 8 * MIB}
# Nothing is kept, and nothing is read before it is wanted.
ON_DEMAND = {
    "home_bytes": 0,
    "chunk_mb": 1.0,
    "staging_mb": 8,
    "lookahead_units": 0,
    "cpu_prefetch_distance": 0,
    "measure": False,
    "poison": True,
}


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net(layers=LAYERS)


@pytest.fixture
def folder(net: Net, tmp_path: Path) -> Path:
    return save(net, tmp_path / "net", shards=2)


@torch.inference_mode()
def result(net: nn.Module) -> torch.Tensor:
    return net(tokens())


def open_net(net: Net, checkpoint: Any, **config: Any) -> wsm.StreamedModule:
    module = on_meta(net, layers=LAYERS)
    return wsm.stream(module, checkpoint, **STREAMED, config={**ON_DEMAND, **config})


# -- between two passes ----------------------------------------------------------------------------


def replace(file: Path) -> None:
    other = file.with_suffix(".other")
    shutil.copy2(file, other)
    other.rename(file)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def grow(file: Path) -> None:
    with open(file, "ab") as stream:
        stream.write(b"x")


def rewrite(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"1234")


def swap_for_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "replaced": (replace, "was replaced by another file"),
    "truncated": (truncate, r"was truncated from (\d+) to \d+ bytes"),
    "grown": (grow, r"was grown from (\d+) to \d+ bytes"),
    "rewritten": (rewrite, "was modified"),
    "deleted": (Path.unlink, "was deleted"),
    "a pipe": (swap_for_a_pipe, "was replaced by another file"),
}


@pytest.mark.parametrize("keep", [False, True], ids=["from the disk", "from the host cache"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_is_found_before_the_next_pass(
    change: str, keep: bool, net: Net, folder: Path
) -> None:
    make, words = CHANGES[change]
    file = folder / "model-00002-of-00002.safetensors"
    aside = folder / "aside"
    with open_net(net, folder) as streamed:
        if keep:
            streamed.resize(host_memory=64 * MIB)
        expected = result(net)
        assert torch.equal(result(streamed), expected)
        os.link(file, aside)  # the very file, to put back
        status = file.stat()
        make(file)
        for _ in range(2):
            with pytest.raises(OSError, match=re.escape(str(file)) + " " + words) as error:
                result(streamed)
            assert "put the file back, or load the model again" in str(error.value)
        if change in ("replaced", "deleted", "a pipe"):
            aside.rename(file)
            assert torch.equal(result(streamed), expected)
        else:
            assert file.stat().st_ino == status.st_ino


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_has_changed_is_not_mixed_with_what_a_resize_keeps(
    change: str, net: Net, folder: Path
) -> None:
    make, words = CHANGES[change]
    file = folder / "model-00001-of-00002.safetensors"
    with open_net(net, folder) as streamed:
        assert torch.equal(result(streamed), result(net))
        make(file)
        with pytest.raises(OSError, match=re.escape(str(file)) + " " + words):
            streamed.resize(host_memory=16 * MIB)


# -- in the middle of a pass -----------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"reader": "pread"}, {"direct": "off"}], ids=str)
def test_a_file_that_gets_shorter_in_a_pass_is_an_error(
    config: dict[str, str], net: Net, folder: Path
) -> None:
    files = sorted(folder.iterdir())
    contents = [file.read_bytes() for file in files]
    with open_net(net, folder, **config) as streamed:
        assert torch.equal(result(streamed), result(net))

        def cut(*_: object) -> None:
            for file in files:
                os.truncate(file, 100_000)

        hook = streamed.layers[1].mlp.register_forward_hook(cut)
        words = r"cannot read .* of .*safetensors: truncated: the file ends at 100000, but must"
        with pytest.raises(OSError, match=words) as error:
            result(streamed)
        assert "it was read for unit 'layers.2" in str(error.value)
        hook.remove()
        with pytest.raises(OSError, match="was truncated"):
            result(streamed)
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    with open_net(net, folder, **config) as streamed:
        assert torch.equal(result(streamed), result(net))


def test_a_file_that_is_replaced_or_deleted_in_a_pass_is_read_to_its_end(
    net: Net, folder: Path
) -> None:
    """What is open is the file of before: the pass is whole, and the next one is refused."""
    first, second = sorted(folder.iterdir())
    with open_net(net, folder) as streamed:

        def change(*_: object) -> None:
            first.unlink()
            replace(second)
            rewrite(second)

        hook = streamed.layers[1].mlp.register_forward_hook(change)
        assert torch.equal(result(streamed), result(net))
        hook.remove()
        with pytest.raises(OSError, match=r"was deleted|was replaced"):
            result(streamed)


def test_a_file_that_changes_between_its_header_and_its_weights(net: Net, folder: Path) -> None:
    checkpoint = wsm.Checkpoint.open(folder)
    swap_for_a_pipe(checkpoint.shards[1])
    with pytest.raises(OSError, match=r"00002-of-00002.*not a regular file"):
        open_net(net, checkpoint)


# -- the hub's cache -------------------------------------------------------------------------------


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path) -> Path:
    """As the hub client lays it out: blobs, and a snapshot of links to them."""
    repo = tmp_path / "models--owner--name"
    place = repo / "snapshots" / "0123abcd"
    (repo / "blobs").mkdir(parents=True)
    place.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repo / "blobs" / f"{number}f00d")
        (place / file.name).symlink_to(f"../../blobs/{number}f00d")
    return place


def test_links_to_blobs_are_followed(net: Net, snapshot: Path) -> None:
    for source in (snapshot, sorted(snapshot.iterdir())):
        with open_net(net, source) as streamed:
            assert torch.equal(result(streamed), result(net))
            blobs = [Path(file).parent.name for file in streamed.stats()["readers"]]
            assert blobs == ["blobs", "blobs"]


def test_a_link_whose_blob_is_missing_is_named_with_its_blob(net: Net, snapshot: Path) -> None:
    (snapshot / "../../blobs/1f00d").resolve().unlink()
    words = r"00002-of-00002\.safetensors links to \.\./\.\./blobs/1f00d, which is missing"
    with pytest.raises(wsm.CheckpointError, match=words):
        open_net(net, snapshot)


def test_a_blob_that_is_replaced_or_deleted_is_found(net: Net, snapshot: Path) -> None:
    blobs = snapshot.parent.parent / "blobs"
    with open_net(net, snapshot) as streamed:
        assert torch.equal(result(streamed), result(net))
        replace(blobs / "0f00d")
        with pytest.raises(OSError, match=r"blobs/0f00d was replaced"):
            result(streamed)
    with open_net(net, snapshot) as streamed:
        assert torch.equal(result(streamed), result(net))
        (blobs / "1f00d").unlink()
        with pytest.raises(OSError, match=r"blobs/1f00d was deleted"):
            result(streamed)


def test_a_link_that_is_turned_to_another_blob_changes_nothing(net: Net, snapshot: Path) -> None:
    """What is open is a blob, and that is still there."""
    link = snapshot / "model-00001-of-00002.safetensors"
    with open_net(net, snapshot) as streamed:
        link.unlink()
        link.symlink_to("../../blobs/1f00d")
        assert torch.equal(result(streamed), result(net))


# -- what is no file -------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    path.mkdir()


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is not a regular file"),
        (make_folder, "is not a regular file"),
        (link_to_zeros, "is not a regular file"),
        (link_to_itself, "cannot be opened|links to .*, which is missing"),
    ],
)
def test_what_is_no_file_is_refused_without_waiting(
    make: Callable[[Path], None], words: str, indexed: bool, net: Net, folder: Path
) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    names = list(wsm.Checkpoint.open(file).tensors)
    file.unlink()
    make(file)
    source: Any = [file]
    if indexed:
        source = folder / "model.safetensors.index.json"
        entries = ", ".join(f'"{name}": "{file.name}"' for name in names)
        source.write_text(f'{{"weight_map": {{{entries}}}}}')
    with pytest.raises(wsm.CheckpointError, match=rf"00002-of-00002\.safetensors.*({words})"):
        open_net(net, source)

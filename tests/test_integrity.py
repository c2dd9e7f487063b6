"""verify=True: a wrong byte is found before its unit runs, wherever it went wrong."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import wsm_ext as wsm
from wsm_ext.checkpoints.checkpoint import Checkpoint
from wsm_ext.checkpoints.hashes import SIDECAR, read_sidecar
from wsm_ext.checkpoints.image import CheckpointError, Extent, TensorImage
from wsm_ext.checkpoints.verify import verify
from wsm_ext.hf.synthetic import make_llama_checkpoint
from wsm_ext.runtime import integrity
from wsm_ext.runtime.integrity import IntegrityError

SIZE: dict[str, Any] = {"layers": 4, "hidden": 160}
POISON = {"chunk_mb": 0.25, "poison": True, "home_bytes": 0}
BUDGETS: dict[str, dict[str, Any]] = {
    "disk": {"device_memory": "3MiB", "host_memory": "1MiB", "config": {**POISON, "staging_mb": 1}},
    "cache": {"device_memory": "3MiB", "host_memory": "12MiB", "config": POISON},
    "mixture": {
        "device_memory": "5MiB",
        "host_memory": "3MiB",
        "config": {"chunk_mb": 0.25, "poison": True},
    },
    "resident": {"device_memory": "64MiB", "host_memory": "1MiB"},
}


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net(**SIZE)


@pytest.fixture
def folder(net: Net, tmp_path: Path) -> Path:
    save(net, tmp_path / "net", shards=3)
    verify(Checkpoint.open(tmp_path / "net"))
    return tmp_path / "net"


def open_net(net: Net, folder: Path, budget: str, device: torch.device, **more: Any) -> Any:
    more = {"verify": True, **BUDGETS[budget], **more}
    return wsm.stream(on_meta(net, **SIZE), folder, device=device, **more)


def write(extent: Extent, checkpoint: Checkpoint, at: int) -> None:
    """Turn a bit in the file, so that nothing but its bytes tells: not even its time changes."""
    path = checkpoint.shards[extent.shard]
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(extent.offset + at % extent.nbytes)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x40]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip(folder: Path, name: str, at: int = 0) -> None:
    checkpoint = Checkpoint.open(folder)
    [extent] = checkpoint.tensors[name].extents
    write(extent, checkpoint, at)


def run(streamed: Any, device: torch.device, seed: int = 0) -> torch.Tensor:
    with torch.inference_mode():
        return streamed(tokens(seed=seed).to(device)).cpu()


def expected(net: Net, device: torch.device, seed: int = 0) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = net.to(device)(tokens(seed=seed).to(device)).cpu()
    net.to("cpu")
    return out


# -- right bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
def test_right_bytes_pass_and_each_load_is_counted(
    net: Net, folder: Path, budget: str, device: torch.device
) -> None:
    buffers = sum(buffer.nbytes for name, buffer in net.named_buffers() if "scale" in name)
    with open_net(net, folder, budget, device) as streamed:
        plan = streamed.plan
        stays = plan.device_home_bytes
        streams = plan.host_home_bytes + plan.disk_home_bytes
        units = sum(unit.streamed_bytes > 0 for unit in plan.units)
        assert streamed.stats()["verified"] == {"units": 0, "bytes": buffers + stays}
        for index in range(3):
            assert torch.equal(run(streamed, device, index), expected(net, device, index))
        counts = streamed.stats()["verified"]
        # Poison has each unit loaded again for each pass.
        assert counts == {"units": 3 * units, "bytes": buffers + stays + 3 * streams}
        if budget == "mixture":
            assert min(stays, plan.host_home_bytes, plan.disk_home_bytes) > 0
        handle = wsm.handle(streamed)
    assert handle.stats()["verified"] == counts


def test_a_unit_that_stays_is_checked_once(net: Net, folder: Path, device: torch.device) -> None:
    config = {"home_bytes": 0, "lookahead_units": 0}
    x = torch.randn(2, SIZE["hidden"]).to(device)
    with (
        open_net(net, folder, "cache", device, config=config, units="layer") as streamed,
        torch.inference_mode(),
    ):
        for layer, loads in ((1, 1), (1, 1), (2, 2), (2, 2), (1, 3)):
            streamed.layers[layer](x)
            assert streamed.stats()["totals"]["loads"] == loads
            assert streamed.stats()["verified"]["units"] == loads


def test_without_verify_nothing_is_checked(net: Net, folder: Path, device: torch.device) -> None:
    flip(folder, "layers.1.self_attn.weight")
    with open_net(net, folder, "disk", device, verify=None) as streamed:
        run(streamed, device)
        assert streamed.stats()["verified"] == {"units": 0, "bytes": 0}
        assert not wsm.handle(streamed).session.swapper.arrivals


def test_a_resize_checks_what_is_loaded_by_it(net: Net, folder: Path, device: torch.device) -> None:
    with open_net(net, folder, "mixture", device) as streamed:
        run(streamed, device)
        before, stays = streamed.stats()["verified"], streamed.plan.device_home_bytes
        streamed.resize(device_memory="64MiB")
        after = streamed.stats()["verified"]
        assert after["units"] == before["units"]
        assert 0 < after["bytes"] - before["bytes"] <= streamed.plan.device_home_bytes
        assert stays < streamed.plan.device_home_bytes
        assert torch.equal(run(streamed, device), expected(net, device))


# -- bytes that are wrong in the file --------------------------------------------------------------


@pytest.mark.parametrize("budget", ["disk", "cache", "mixture"])
@pytest.mark.parametrize("units", ["layer", "group", "leaf"])
def test_a_flipped_byte_in_the_file_is_found_in_its_unit(
    net: Net, folder: Path, units: str, budget: str, device: torch.device
) -> None:
    chosen = random.Random(f"{units} {budget}")
    checkpoint = Checkpoint.open(folder)
    names = sorted(name for name in checkpoint.tensors if "scale" not in name)
    for at in (0, -1, chosen.randrange(1 << 20)):
        name = chosen.choice(names)
        [extent] = checkpoint.tensors[name].extents
        write(extent, checkpoint, at)
        assert verify(checkpoint).differ == [name]
        with (
            pytest.raises(IntegrityError) as caught,
            open_net(net, folder, budget, device, units=units) as streamed,
        ):
            run(streamed, device)
        said = str(caught.value)
        unit = said.partition("(unit '")[2].partition("'")[0]
        assert f"tensor {name!r} is not as it was recorded" in said
        assert name.startswith(f"{unit}.")
        assert f"{checkpoint.shards[extent.shard]}, offset {extent.offset}" in said
        assert read_sidecar(folder / SIDECAR)[name].digest in said
        assert "wsm verify --update" in said
        write(extent, checkpoint, at)
    with open_net(net, folder, budget, device, units=units) as streamed:
        assert torch.equal(run(streamed, device), expected(net, device))


@pytest.mark.parametrize("name", ["embed.weight", "layers.3.mlp.2.bias", "layers.2.scale"])
def test_what_stays_is_checked_at_start(
    net: Net, folder: Path, name: str, device: torch.device
) -> None:
    flip(folder, name, -1)
    with pytest.raises(IntegrityError, match=f"tensor '{name}'"):
        open_net(net, folder, "resident", device)


@pytest.mark.parametrize("budget", ["disk", "cache"])
def test_after_a_fault_that_passed_the_next_pass_works(
    net: Net, folder: Path, budget: str, device: torch.device
) -> None:
    name = "layers.2.mlp.0.weight"
    flip(folder, name)
    with open_net(net, folder, budget, device) as streamed:
        for _ in range(2):
            with pytest.raises(IntegrityError, match=name):
                run(streamed, device)
        flip(folder, name)
        with suppress(IntegrityError):  # what was read ahead while the fault was there
            run(streamed, device)
        for index in range(2):
            assert torch.equal(run(streamed, device, index), expected(net, device, index))


def test_fetch_checks_too(net: Net, folder: Path, device: torch.device) -> None:
    name = "layers.2.mlp.0.weight"
    flip(folder, name)
    with open_net(net, folder, "disk", device) as streamed:
        with pytest.raises(IntegrityError, match=name):
            streamed.fetch(name)
        wanted = net.get_parameter("layers.1.mlp.0.weight").detach()
        assert torch.equal(streamed.fetch("layers.1.mlp.0.weight").cpu(), wanted)


# -- bytes that go wrong on their way --------------------------------------------------------------


class Poke:
    """Turns a bit in the arena when a unit has come for the n-th time, just before the check."""

    def __init__(self, streamed: Any, name: str, at: int, nth: int) -> None:
        session = wsm.handle(streamed).session
        [index] = [i for i, unit in enumerate(session.planned.units) if unit.name == name]
        arrivals = session.swapper.arrivals[index]
        self._check = arrivals.check
        self._arena = session.memory.arena
        self._begin = session.planned.plan.place(index).offset + at
        self._left = nth
        arrivals.check = self

    def __call__(self, unchecked: bool) -> None:
        self._left -= 1
        if self._left == 0:
            self._arena[self._begin].bitwise_xor_(1)
        self._check(unchecked)


@pytest.mark.parametrize("budget", ["disk", "cache"])
def test_a_bit_that_flips_on_the_way_is_found_and_read_again(
    net: Net, folder: Path, budget: str, device: torch.device
) -> None:
    with open_net(net, folder, budget, device, units="layer") as streamed:
        assert torch.equal(run(streamed, device), expected(net, device))
        Poke(streamed, "layers.2", 12345, nth=1)
        with pytest.raises(IntegrityError, match=r"\(unit 'layers.2'; .* damaged on their way"):
            run(streamed, device)
        assert torch.equal(run(streamed, device), expected(net, device))


def test_a_bit_that_flips_for_the_backward_is_found(
    net: Net, folder: Path, device: torch.device
) -> None:
    hidden = net.embed(tokens()).detach()
    wanted = hidden.clone().requires_grad_()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    x: torch.Tensor = wanted
    for layer in net.layers:
        x = layer(x)
    x.sum().backward()
    with open_net(net, folder, "disk", device, units="layer") as streamed:

        def gradient() -> torch.Tensor:
            given = hidden.clone().to(device).requires_grad_()
            x: torch.Tensor = given
            for layer in streamed.layers:
                x = layer(x)
            x.sum().backward()
            assert given.grad is not None
            return given.grad.cpu()

        for parameter in streamed.parameters():
            parameter.requires_grad_(False)
        if device.type == "cpu":
            assert torch.equal(gradient(), wanted.grad)
        Poke(streamed, "layers.1", 777, nth=2)  # the first is the forward's
        with pytest.raises(IntegrityError, match=r"unit 'layers.1'"):
            gradient()
        if device.type == "cpu":
            assert torch.equal(gradient(), wanted.grad)


def test_a_check_that_was_interrupted_is_still_due(net: Net, folder: Path) -> None:
    cpu = torch.device("cpu")
    asked: list[bool] = []

    class Interrupted:
        """The check of a unit; the first one is interrupted."""

        def __init__(self, check: Any) -> None:
            self._check = check

        def __call__(self, unchecked: bool) -> None:
            asked.append(unchecked)
            if len(asked) == 1:
                raise KeyboardInterrupt
            self._check(unchecked)

    with open_net(net, folder, "disk", cpu, units="layer") as streamed:
        session = wsm.handle(streamed).session
        [index] = [i for i, u in enumerate(session.planned.units) if u.name == "layers.2"]
        arrivals = session.swapper.arrivals[index]
        arrivals.check = Interrupted(arrivals.check)
        with pytest.raises(KeyboardInterrupt):
            run(streamed, cpu)
        assert torch.equal(run(streamed, cpu), expected(net, cpu))
        assert asked == [True, True]
        assert wsm.handle(streamed).session.swapper.seam.idle


# -- parameters that are made of tensors -----------------------------------------------------------

LLAMA = {"layers": 6, "hidden": 128, "intermediate": 352, "heads": 4, "kv_heads": 2, "vocab": 128}
IDS = torch.arange(1, 11)[None]


def logits(folder: Path, device: torch.device, **options: Any) -> tuple[torch.Tensor, Any]:
    with wsm.from_pretrained(folder, device=device, **options) as model:
        with torch.inference_mode():
            for _ in range(2):
                out = model(IDS.to(device)).logits.cpu()
        return out, model.stats()["verified"]


@pytest.mark.parametrize("device_memory", ["4MiB", "64MiB"])
def test_what_is_cast_is_checked_as_it_arrives(
    tmp_path: Path, device_memory: str, device: torch.device
) -> None:
    folder = make_llama_checkpoint(tmp_path / "model", shards=2, **LLAMA)
    made = verify(Checkpoint.open(folder))
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "device_memory": device_memory,
        "host_memory": "1MiB",
        "config": {"poison": True},
    }
    plain, none = logits(folder, device, **options)
    checked, counts = logits(folder, device, verify=True, **options)
    assert torch.equal(checked, plain)
    assert none == {"units": 0, "bytes": 0}
    assert (counts["bytes"] == made.bytes) == (device_memory == "64MiB")
    assert counts["bytes"] >= made.bytes
    for name in ("model.layers.4.mlp.down_proj.weight", "model.norm.weight"):
        flip(folder, name, 5)
        with pytest.raises(IntegrityError, match=name):
            logits(folder, device, verify=True, **options)
        flip(folder, name, 5)


def test_a_copy_that_differs_from_what_was_made_is_found(net: Net, folder: Path) -> None:
    checker = integrity.Checker(Checkpoint.open(folder), None)
    whole = torch.tensor([1.0, float("nan"), 0.0])
    checker.check_copy(whole, whole.clone(), "parameter 'x'")
    with pytest.raises(IntegrityError, match="parameter 'x' has other bytes on cpu"):
        checker.check_copy(whole, torch.tensor([1.0, float("nan"), -0.0]), "parameter 'x'")


@pytest.mark.parametrize("units", ["layer", "leaf"])
def test_fused_experts_are_checked_by_the_tensors_of_the_file(
    tmp_path: Path, units: str, device: torch.device
) -> None:
    torch.manual_seed(1)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, vocab_size=128,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe", max_shard_size="500KB")
    folder = tmp_path / "moe"
    verify(Checkpoint.open(folder))
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert name in Checkpoint.open(folder).tensors
    options = {"device_memory": "2MiB", "host_memory": "512KiB", "units": units, "verify": True}
    options["config"] = {"home_bytes": 0, "poison": True}
    plain, _ = logits(folder, device, **{**options, "verify": False})
    checked, counts = logits(folder, device, **options)
    assert torch.equal(checked, plain)
    assert counts["units"] > 0
    for at in (0, -1):
        flip(folder, name, at)
        with pytest.raises(IntegrityError, match=name):
            logits(folder, device, **options)
        flip(folder, name, at)


class Three(nn.Module):
    """Parameters that a file may keep in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=False, device="meta") for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v(self.k(self.q(x)))


def cut(file: Path, ways: str) -> Checkpoint:
    """q, k and v as images over one tensor, each a third, or every third row of it."""
    checkpoint = Checkpoint.open(file)
    [whole] = checkpoint.tensors["qkv"].extents
    row = 64 * 4
    images = {}
    for index, name in enumerate(("q.weight", "k.weight", "v.weight")):
        if ways == "thirds":
            extents = [Extent(0, whole.offset + 64 * row * index, 64 * row)]
        else:
            extents = [
                Extent(0, whole.offset + row * (3 * line + index), row, row * line)
                for line in range(64)
            ]
        images[name] = TensorImage(name, torch.float32, (64, 64), tuple(extents))
    return replace(checkpoint, tensors=images)


@pytest.mark.parametrize("ways", ["thirds", "rows"])
def test_parts_of_a_tensor_are_known_by_the_whole(
    tmp_path: Path, ways: str, device: torch.device
) -> None:
    file = tmp_path / "three.safetensors"
    save_file({"qkv": torch.randn(192, 64)}, file)
    verify(Checkpoint.open(file))
    given: dict[str, Any] = {"device": device, "device_memory": "2MiB", "host_memory": "256KiB"}
    given |= {"units": "leaf", "verify": True, "config": {"home_bytes": 0, "poison": True}}
    row = load_file(file)["qkv"]
    x = torch.randn(2, 64)
    with wsm.stream(Three(), cut(file, ways), **given) as streamed, torch.inference_mode():
        split = row.chunk(3) if ways == "thirds" else [row[i::3] for i in range(3)]
        for name, wanted in zip("qkv", split, strict=True):
            assert torch.equal(streamed.fetch(f"{name}.weight").cpu(), wanted)
        streamed(x.to(device))
        before = streamed.stats()["verified"]
        assert before == {"units": 3, "bytes": 2 * row.nbytes}  # the fetches, and the pass
        # In the file from now on: found by the hash of the part that was taken at start.
        flip(file, "qkv", 100 * 256)
        # Row 100 of 192 lies in the second third; and 100 % 3 is 1.
        message = r"'qkv' is not as .* in 16384 of its bytes.*unit 'k'"
        with pytest.raises(IntegrityError, match=message):
            streamed(x.to(device))
    with pytest.raises(IntegrityError, match=r"'qkv' .*before anything was loaded"):
        wsm.stream(Three(), cut(file, ways), **given)


def test_tied_parameters_are_checked_where_each_lies(tmp_path: Path, device: torch.device) -> None:
    net = make_net(tied=True, **SIZE)
    save(net, tmp_path)
    verify(Checkpoint.open(tmp_path))
    options = {**BUDGETS["disk"], "device": device, "verify": True}
    with wsm.stream(on_meta(net, tied=True, **SIZE), tmp_path, **options) as streamed:
        assert torch.equal(run(streamed, device), expected(net, device))
        counts = streamed.stats()["verified"]["bytes"]
        assert counts == sum(unit.streamed_bytes for unit in streamed.plan.units) + 4 * 4
        Poke(streamed, "head", 8, nth=1)
        with pytest.raises(IntegrityError, match=r"tensor 'embed.weight' .*\(unit 'head'"):
            run(streamed, device)
        assert torch.equal(run(streamed, device), expected(net, device))


def test_computed_parameters_are_checked_against_what_was_computed(
    net: Net, folder: Path, device: torch.device
) -> None:
    checkpoint = Checkpoint.open(folder)
    name = "layers.2.mlp.0.weight"
    left = {key: image for key, image in checkpoint.tensors.items() if key != name}
    value = net.get_parameter(name).detach().clone()
    partial = replace(checkpoint, tensors=left, computed={name: value})
    with open_net(net, partial, "disk", device, units="layer") as streamed:  # type: ignore[arg-type]
        assert torch.equal(run(streamed, device), expected(net, device))
        value[0, 0] += 1
        with pytest.raises(IntegrityError, match=f"tensor '{name}' .*computed, in RAM"):
            run(streamed, device)


# -- what is asked wrongly -------------------------------------------------------------------------


def test_no_sidecar_is_an_error_that_says_how_to_make_one(net: Net, tmp_path: Path) -> None:
    save(net, tmp_path / "net")
    with pytest.raises(CheckpointError, match=rf"`wsm verify {tmp_path}/net` makes them"):
        open_net(net, tmp_path / "net", "disk", torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"--sidecar gone.json` makes them"):
        open_net(net, tmp_path / "net", "disk", torch.device("cpu"), verify="gone.json")
    files = [tmp_path / "net" / "model.safetensors"]
    with pytest.raises(CheckpointError, match="name the sidecar"):
        open_net(net, files, "disk", torch.device("cpu"))  # type: ignore[arg-type]


def test_hashes_may_lie_elsewhere(
    net: Net, folder: Path, tmp_path: Path, device: torch.device, monkeypatch: Any
) -> None:
    elsewhere = tmp_path / "sums.json"
    os.rename(folder / SIDECAR, elsewhere)
    files = sorted(folder.glob("*.safetensors"))
    with open_net(net, files, "resident", device, verify=elsewhere) as streamed:  # type: ignore[arg-type]
        assert streamed.stats()["verified"]["bytes"] > 0
    monkeypatch.setenv("WSM_VERIFY", str(elsewhere))
    with open_net(net, folder, "resident", device, verify=None) as streamed:
        assert streamed.stats()["verified"]["bytes"] > 0
    with open_net(net, folder, "resident", device, verify=False) as streamed:
        assert streamed.stats()["verified"]["bytes"] == 0


def test_weights_without_a_checkpoint_have_no_hashes(monkeypatch: Any) -> None:
    options = {**BUDGETS["disk"], "device": "cpu"}
    with pytest.raises(ValueError, match=r"^verify=True: the weights come from the module itself"):
        wsm.stream(make_net(**SIZE), verify=True, **options)
    monkeypatch.setenv("WSM_VERIFY", "1")
    with pytest.warns(UserWarning, match="WSM_VERIFY=True has no effect"):
        wsm.stream(make_net(**SIZE), **options).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("norm.bias"), "'norm.bias' .*has no hash of it"),
        (
            lambda tensors: tensors["norm.bias"].update(shape=[80, 2]),
            r"'norm.bias' is torch.float32 \[160\] .*but torch.float32 \[80, 2\]",
        ),
        (lambda tensors: tensors["norm.bias"].update(dtype="int32"), "but torch.int32"),
        (lambda tensors: tensors["norm.bias"].update(hash=""), "not a dtype, a shape and a hash"),
    ],
)
def test_hashes_of_another_checkpoint_are_refused_before_anything_is_loaded(
    net: Net, folder: Path, change: Any, message: str
) -> None:
    import json

    content = json.loads((folder / SIDECAR).read_text())
    change(content["tensors"])
    (folder / SIDECAR).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        open_net(net, folder, "disk", torch.device("cpu"))

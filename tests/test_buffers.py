"""Buffers: one tensor stays one, values come from the checkpoint or not at all, budgets hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import make_net
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from transformers import BertConfig, BertModel

import wsm_ext as wsm
from wsm_ext.checkpoints.checkpoint import CheckpointError

MIB = 1 << 20
WIDTH = 128
BUDGETS: dict[str, Any] = {"device": "cpu", "device_memory": "3MiB", "host_memory": "2MiB"}
LAYERS = 8


class Layer(nn.Module):
    def __init__(self, *tables: torch.Tensor, persistent: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        for index, table in enumerate(tables):
            self.register_buffer(f"table{index}", table, persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.linear(x))
        for table in self.buffers():
            x = x + table.to(x.dtype).sum()
        return x


def shared(value: float = 0.0) -> nn.Module:
    """Layers that share a buffer, under other names than they share another."""
    torch.manual_seed(0)
    table, more = torch.full((WIDTH,), value), torch.full((7,), value)
    layers = [Layer(table, more) if i % 2 else Layer(more, table) for i in range(LAYERS)]
    return nn.Sequential(*layers).requires_grad_(False)


def views(value: float = 0.0) -> nn.Module:
    """Layers whose buffers are parts of one tensor, some of which overlap."""
    torch.manual_seed(0)
    whole = torch.full((4 * WIDTH,), value).add_(torch.arange(4 * WIDTH) * value)
    parts = [whole[i * 50 : i * 50 + WIDTH] for i in range(LAYERS)]
    return nn.Sequential(*(Layer(part) for part in parts)).requires_grad_(False)


class Twice(nn.Module):
    """A module at two places: its tensors have two names each, and a file has one of them."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.zuse = Layer(torch.full((WIDTH,), value))
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.ada = self.zuse
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ada(self.layers(self.zuse(x)))


def test_a_buffer_that_layers_share_has_one_value(device: torch.device, tmp_path: Path) -> None:
    reference, x = shared(3.0), torch.randn(2, WIDTH)
    expected = reference(x)
    save_model(reference, str(tmp_path / "model.safetensors"))
    assert len(load_file(tmp_path / "model.safetensors")) == 2 * LAYERS + 2
    module = shared()
    found = dict(module.named_buffers(remove_duplicate=False))
    with wsm.stream(module, tmp_path, **{**BUDGETS, "device": device}) as streamed:
        buffers = list(module.buffers())
        assert len(buffers) == 2
        assert {buffer.device.type for buffer in buffers} == {device.type}
        for name, value in reference.named_buffers():
            assert torch.equal(module.get_buffer(name).cpu(), value)
        if device.type == "cpu":
            assert torch.equal(streamed(x), expected)
        buffers[0].add_(1)
        held = [b for _, b in module.named_buffers(remove_duplicate=False)]
        assert sum(bool((b == 4).all()) for b in held) == LAYERS
        assert streamed.stats()["memory"]["buffer_bytes"] == 2 * 512
    assert all(found[n] is b for n, b in module.named_buffers(remove_duplicate=False))


@pytest.mark.parametrize("meta", [False, True])
def test_views_of_one_tensor_stay_views_of_one(
    meta: bool, device: torch.device, tmp_path: Path
) -> None:
    reference = views(2.0)
    save_file({k: v.clone() for k, v in reference.state_dict().items()}, tmp_path / "a.safetensors")
    with torch.device("meta" if meta else "cpu"):
        module = views()
    with wsm.stream(module, tmp_path, **{**BUDGETS, "device": device}) as streamed:
        assert len({b.untyped_storage().data_ptr() for b in module.buffers()}) == 1
        for name, value in reference.named_buffers():
            assert torch.equal(module.get_buffer(name).cpu(), value)
        module[0].table0[60] = 77
        assert module[1].table0[10] == 77
        assert streamed.stats()["memory"]["buffer_bytes"] == 4 * 4 * WIDTH


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_views_of_the_module_s_own_go_as_they_are(value: float, device: torch.device) -> None:
    module, reference = views(value), views(value)
    with wsm.stream(module, None, **{**BUDGETS, "device": device}):
        assert len({b.untyped_storage().data_ptr() for b in module.buffers()}) == 1
        for name, expected in reference.named_buffers():
            assert torch.equal(module.get_buffer(name).cpu(), expected)


def test_a_module_at_two_places_may_be_saved_under_either_name(tmp_path: Path) -> None:
    reference, x = Twice(2.0), torch.randn(2, WIDTH)
    save_model(reference, str(tmp_path / "model.safetensors"))
    assert not any(name.startswith("zuse") for name in load_file(tmp_path / "model.safetensors"))
    with wsm.stream(Twice(), tmp_path, **BUDGETS) as streamed:
        assert torch.equal(streamed(x), reference(x))


def saved(module: nn.Module, folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = {name: value.clone() for name, value in module.state_dict().items()}
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


def one(**options: Any) -> nn.Sequential:
    layers = [Layer(torch.arange(4.0), torch.arange(3), **options), *(Layer() for _ in range(4))]
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.table0": None, "0.table1": None}, r"0.table0 is not in.*\n.*0.table1 is not in"),
        ({"0.table0": torch.arange(3.0)}, r"0.table0 has shape \[4\], the checkpoint's has \[3\]"),
        ({"0.table0": torch.arange(4.0).half()}, r"0.table0 is torch.float32.*is torch.float16"),
        ({"0.table1": torch.full((3,), 0.7)}, r"0.table1 is torch.int64.*is torch.float32"),
        ({"0.table1": torch.arange(3).int()}, r"0.table1 is torch.int64.*is torch.int32"),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    saved(one(), tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"does not fit the module:\n  buffer {message}"):
        wsm.stream(one(), tmp_path, **BUDGETS)


def test_two_values_for_one_buffer_are_named(tmp_path: Path) -> None:
    saved(shared(1.0), tmp_path, **{"3.table0": torch.full((WIDTH,), 2.0)})
    with pytest.raises(CheckpointError, match=r"'0.table1' and '3.table0' are one tensor"):
        wsm.stream(shared(), tmp_path, **BUDGETS)


def test_a_buffer_that_is_not_saved_has_no_place_for_a_value(tmp_path: Path) -> None:
    saved(one(), tmp_path)
    with pytest.raises(CheckpointError, match=r"the module does not have: 0.table0, 0.table1"):
        wsm.stream(one(persistent=False), tmp_path, **BUDGETS)


def heavy(**tables: torch.Tensor) -> nn.Sequential:
    module = one()
    for name, table in tables.items():
        module.register_buffer(name, table, persistent=False)
    return module


def test_buffers_that_do_not_fit_are_an_error_with_numbers(tmp_path: Path) -> None:
    saved(one(), tmp_path)
    module = heavy(qweight=torch.zeros(64 * MIB, dtype=torch.int8), small=torch.zeros(100))
    before = dict(module.named_buffers())
    options = {**BUDGETS, "device_memory": "4MiB"}
    with pytest.raises(ValueError, match=r"buffers, which do not stream, take 64.0 MiB \(the"
                                         r" largest is 'qweight' with 64.0 MiB\)"):  # fmt: skip
        wsm.stream(module, tmp_path, **options)
    assert all(module.get_buffer(name) is buffer for name, buffer in before.items())
    # What is left is too little for a unit: the least that is named is enough.
    options["device_memory"] = 65 * MIB
    with pytest.raises(ValueError, match=r"too small: it takes at least (\d+)") as refused:
        wsm.stream(module, tmp_path, **options)
    words = str(refused.value).split()
    assert words[2] == str(65 * MIB)
    options["device_memory"] = int(words[words.index("least") + 1])
    with wsm.stream(module, tmp_path, **options) as streamed:
        memory = streamed.stats()["memory"]
        assert memory["buffer_bytes"] == streamed.plan.buffer_bytes >= 64 * MIB
        assert memory["device_bytes"] + memory["buffer_bytes"] <= memory["device_budget_bytes"]
        assert memory["device_budget_bytes"] == options["device_memory"]
        assert "64.0 MiB buffers" in str(streamed.plan)
        with pytest.raises(ValueError, match="buffers, which do not stream"):
            streamed.resize(device_memory="60MiB")
        streamed.resize(device_memory="80MiB")
        assert not streamed.plan.streams


def test_shrink_leaves_the_buffers_their_room(tmp_path: Path) -> None:
    module = make_net(layers=4)
    module.register_buffer("table", torch.zeros(16 * MIB, dtype=torch.uint8), persistent=False)
    budgets = {"device_memory": "44MiB", "host_memory": "64MiB"}
    with wsm.stream(module, device="cpu", units="leaf", **budgets) as streamed:
        before = streamed.stats()["memory"]["device_bytes"]
        streamed.shrink("4MiB")
        memory = streamed.stats()["memory"]
        assert memory["device_bytes"] <= before - 4 * MIB
        assert memory["device_budget_bytes"] == before - 4 * MIB + memory["buffer_bytes"]


def test_a_buffer_that_modules_share_counts_once(tmp_path: Path) -> None:
    saved(one(), tmp_path)
    table = torch.zeros(12 * MIB, dtype=torch.uint8)
    module = heavy(a=table, b=table, c=table[: 2 * MIB])
    with wsm.stream(module, tmp_path, **{**BUDGETS, "device_memory": "15MiB"}) as streamed:
        assert 12 * MIB < streamed.stats()["memory"]["buffer_bytes"] < 12.1 * MIB


def test_from_pretrained_refuses_a_cast_that_changes_values(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, intermediate_size=32, vocab_size=32))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = "encoder.layer.0.output.dense.weight"
    tensors[key] = (tensors[key] * 100).to(torch.int8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{key} \(file torch.int8, model torch.float32\)"):
        wsm.from_pretrained(tmp_path, **BUDGETS)

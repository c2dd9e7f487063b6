"""The workload: a trial forward finds what activations take, and the budget leaves room for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens
from torch import nn

import wsm_ext as wsm
from wsm_ext.runtime.trial import _Tracker

MIB = 1 << 20


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net()


@pytest.fixture(scope="module")
def folder(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(net, tmp_path_factory.mktemp("net"))


def workload(batch: int, length: int) -> Any:
    def run(module: nn.Module) -> Any:
        device = next(module.buffers()).device
        return module(tokens(batch, length).to(device))

    return run


def test_tracker_counts_what_lives_at_once() -> None:
    with _Tracker() as tracker:
        a = torch.zeros(MIB // 4)
        b = a + 1
        del a
        c = b.view(-1) * 2
        assert tracker.peak == 2 * MIB
        d = torch.cat([b, c])
    assert tracker.peak == 4 * MIB
    del b, c, d


def test_the_budget_leaves_room_for_the_workload(
    device: torch.device, net: Net, folder: Path
) -> None:
    budgets = {"device_memory": "50MiB", "host_memory": "90MiB"}
    with wsm.stream(on_meta(net), folder, device=device, **budgets) as streamed:
        assert streamed.plan.activation_bytes is None
        all_of_it = streamed.stats()["memory"]["device_bytes"]
    with wsm.stream(
        on_meta(net), folder, device=device, workload=workload(8, 256), **budgets
    ) as streamed:
        # 2048 tokens: 12 MiB between the two halves of an mlp, and more beside them.
        found = streamed.plan.activation_bytes
        assert found is not None
        assert 18 * MIB < found < 50 * MIB
        memory = streamed.stats()["memory"]
        assert memory["device_bytes"] + found <= 50 * MIB
        assert memory["device_bytes"] < all_of_it
        assert memory["device_budget_bytes"] == 50 * MIB - found
        x = tokens(8, 256)
        with torch.no_grad():
            expected = net.to(device)(x.to(device))
            assert torch.equal(streamed(x.to(device)), expected)
        net.to("cpu")


def test_a_longer_workload_takes_more(net: Net, folder: Path) -> None:
    found = []
    for length in (64, 256):
        with wsm.stream(
            on_meta(net),
            folder,
            device="cpu",
            device_memory="60MiB",
            host_memory="90MiB",
            workload=workload(4, length),
        ) as streamed:
            found.append(streamed.plan.activation_bytes)
    assert 3 * found[0] < found[1] < 5 * found[0]


@pytest.mark.gpu
def test_on_a_gpu_the_real_peak_is_within_the_budget(net: Net, folder: Path) -> None:
    gpu = torch.device("cuda")
    x = tokens(8, 256).to(gpu)
    run = workload(8, 256)
    with wsm.stream(
        on_meta(net), folder, device=gpu, device_memory="80MiB", host_memory="90MiB", workload=run
    ) as streamed:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated() - streamed.stats()["memory"]["device_bytes"]
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            streamed(x)
        peak = torch.cuda.max_memory_allocated()
        assert peak - before <= 80 * MIB
        assert peak - before > 60 * MIB  # and it is used


def test_the_module_is_as_it_was_after_a_trial_that_fails(net: Net, folder: Path) -> None:
    module = on_meta(net)

    def fails(_: nn.Module) -> None:
        raise KeyError("no such input")

    with pytest.raises(ValueError, match=r"workload: the trial forward failed.*no such input"):
        wsm.stream(module, folder, device="cpu", workload=fails)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert "forward" not in module.layers[0].__dict__
    assert not hasattr(module, "_wsm_streamed")


@pytest.mark.parametrize("wrong", [(0, 5), (1,), (1, 2, 3), "1x2", (1.5, 2), (True, 3)])
def test_a_workload_that_makes_no_sense(wrong: Any, net: Net, folder: Path) -> None:
    with pytest.raises(ValueError, match="workload="):
        wsm.stream(on_meta(net), folder, device="cpu", workload=wrong)


def test_sizes_are_for_models_that_take_token_ids(net: Net, folder: Path) -> None:
    with pytest.raises(ValueError, match="takes no input_ids; give a function"):
        wsm.stream(on_meta(net), folder, device="cpu", workload=(1, 8))


def test_a_workload_larger_than_the_budget(net: Net, folder: Path) -> None:
    with pytest.raises(ValueError, match="the workload alone takes"):
        wsm.stream(
            on_meta(net), folder, device="cpu", device_memory="20MiB", workload=workload(16, 512)
        )


def test_a_transformers_model_by_its_sizes(device: torch.device, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    with wsm.from_pretrained(
        tmp_path, device=device, device_memory="60MiB", host_memory="40MiB", workload=(2, 512)
    ) as streamed:
        found = streamed.plan.activation_bytes
        # The KV cache alone: 4 layers, keys and values, 128 floats for each of 1024 tokens.
        assert found is not None
        assert found > 4 * 2 * 128 * 4 * 1024
        ids = torch.arange(64).reshape(2, 32).to(device)
        with torch.no_grad():
            expected = model.to(device)(ids).logits
            assert torch.equal(streamed(ids).logits, expected)


def moe(folder: Path) -> Any:
    """Experts of 96 KiB, 16 of which are chosen for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=16,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).eval().save_pretrained(folder)
    return folder


BATCH = 32
# What a step gathers at once of so many sequences: the gate and up projections of 16 experts each.
GATHERED = BATCH * 16 * 2 * 128 * 64 * 4
MOE: dict[str, Any] = {"device_memory": "128MiB", "host_memory": "8MiB", "workload": (BATCH, 2)}


@pytest.mark.parametrize("switches", [False, True])
def test_a_step_that_gathers_experts_is_planned_for(
    switches: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where `generate()` switches from grouped_mm to batched_mm."""
    from transformers import GenerationMixin

    @contextmanager
    def switch(model: Any) -> Iterator[None]:
        before = model.get_experts_implementation()
        model.set_experts_implementation("batched_mm" if switches else before)
        yield
        model.set_experts_implementation(before)

    monkeypatch.setattr(GenerationMixin, "_optimize_model_for_decode", switch)
    with wsm.from_pretrained(moe(tmp_path), device="cpu", **MOE) as streamed:
        found = streamed.plan.activation_bytes
        assert found is not None
        assert (found > GATHERED) is switches
        assert "batched_mm" not in streamed.get_experts_implementation().values()


@pytest.mark.gpu
def test_on_a_gpu_generate_stays_within_the_budget(tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    with wsm.from_pretrained(moe(tmp_path), device=gpu, **MOE) as streamed:
        memory = streamed.stats()["memory"]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ids = torch.ones((BATCH, 2), dtype=torch.long, device=gpu)
        streamed.generate(ids, max_new_tokens=4, do_sample=False)
        took = torch.cuda.max_memory_allocated() - before
        assert took > GATHERED
        assert took <= streamed.plan.activation_bytes
        assert memory["device_bytes"] + took <= 128 * MIB

"""Plans for a model of 70B shape: a checkpoint of 140 GB whose files are all holes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from wsm_ext import _engine
from wsm_ext.config import Config
from wsm_ext.hf.building import prepare
from wsm_ext.planning.planner import Budgets, HeldBytes, ModulePlan, Planner

GIB = 1 << 30
CPU = torch.device("cpu")
LAYERS = 80
SHAPES = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
    "input_layernorm": (8192,),
    "post_attention_layernorm": (8192,),
}


def write_holes(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros that takes no room on the disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_llama(tmp_path_factory.mktemp("llama-70b"), 128256, LAYERS)


def make_llama(folder: Path, vocab: int, layers: int) -> Any:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    for layer in range(layers):
        name = f"model-{layer:05}.safetensors"
        shapes = {f"model.layers.{layer}.{k}.weight": s for k, s in SHAPES.items()}
        if layer == 0:
            shapes["model.embed_tokens.weight"] = (vocab, 8192)
        if layer == layers - 1:
            shapes["model.norm.weight"] = (8192,)
            shapes["lm_head.weight"] = (vocab, 8192)
        write_holes(folder / name, shapes)
        index |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return prepare(folder)


def plan(
    llama: Any, device: float, host: float, units: Any = "auto", **settings: Any
) -> ModulePlan:
    module, checkpoint = llama
    config = Config.resolve(settings)
    budgets = Budgets(CPU, int(device * GIB), int(host * GIB), config)
    return Planner(module, checkpoint, units, config).plan(budgets)


def test_layers_stream_through_less_than_one_and_a_half_gib(tmp_path: Path) -> None:
    planned = plan(make_llama(tmp_path, 32000, 4), 1.5, 150)
    assert planned.mode == "leaf"
    assert planned.plan.lookahead_units >= 1
    assert planned.plan.arena_bytes < 1.5 * GIB


def test_a_large_head_is_all_that_needs_more(llama: Any) -> None:
    planned = plan(llama, 2.5, 150, units="leaf")
    assert planned.plan.lookahead_units >= 1
    assert planned.plan.arena_bytes < 2.5 * GIB  # the head, and what comes before it
    with pytest.raises(ValueError, match=r"device_memory = .*(lm_head|embed_tokens)"):
        plan(llama, 1.9, 150)


def test_little_memory_takes_finer_units_and_plenty_takes_layers(llama: Any) -> None:
    assert plan(llama, 2.5, 150).mode in ("group", "leaf")
    assert plan(llama, 132, 8).mode == "layer"
    assert plan(llama, 12, 8, units="layer").mode == "layer"


def test_a_plan_that_follows_another_keeps_its_units(llama: Any) -> None:
    module, checkpoint = llama
    config = Config()
    planner = Planner(module, checkpoint, "auto", config)
    before = planner.plan(Budgets(CPU, 2 * GIB, 150 * GIB, config))
    alone = planner.plan(Budgets(CPU, 120 * GIB, 150 * GIB, config))
    after = planner.plan(Budgets(CPU, 120 * GIB, 150 * GIB, config), before=before)
    assert before.mode == after.mode != alone.mode


def test_both_budgets_are_used(llama: Any) -> None:
    for device, host in ((4, 16), (12, 48), (24, 64), (60, 100)):
        made = plan(llama, device, host).plan
        largest = 128256 * 8192 * 2
        assert device * GIB - largest < made.device_bytes <= device * GIB
        taken = made.cache_bytes + made.staging_bytes
        assert taken <= host * GIB
        if made.disk_home_bytes:
            assert taken > host * GIB - made.chunk_bytes


def test_what_comes_from_the_disk_is_spread_evenly(llama: Any) -> None:
    """Every stretch of the pass asks the same of the disk: a small ring is enough."""
    made = plan(llama, 12, 70).plan
    rates = _engine.Rates()
    rates.h2d_bytes_per_s = 50e9
    simulated = _engine.simulate(made, rates)
    assert simulated.bottleneck == "disk"
    assert simulated.disk_bytes == made.disk_home_bytes > 0
    assert simulated.pass_seconds <= 1.01 * simulated.disk_seconds


def test_rates_change_how_memory_is_split(llama: Any) -> None:
    """Where computing hides the link, more is looked ahead; where nothing does, more is kept."""
    module, checkpoint = llama
    config = Config()
    planner = Planner(module, checkpoint, "layer", config)
    budgets = Budgets(CPU, 14 * GIB, 200 * GIB, config)

    def passes(compute_s: float) -> tuple[float, float]:
        def rates_of(units: Any, source: Any) -> _engine.Rates:
            rates = _engine.Rates()
            rates.h2d_bytes_per_s = 25e9
            rates.compute_s = [compute_s if unit.layer is not None else 0.0 for unit in units]
            return rates

        found, usual = planner.plan(budgets, rates_of), planner.plan(budgets)
        rates = rates_of(found.units, found.source)
        simulated = [_engine.simulate(planned.plan, rates) for planned in (found, usual)]
        return simulated[0].pass_seconds, simulated[1].pass_seconds

    for compute_s in (0.0, 0.03, 0.2):
        found, usual = passes(compute_s)
        assert found <= usual * (1 + 1e-9)


def test_a_workload_is_taken_from_the_budget() -> None:
    config = Config()
    budgets = Budgets(CPU, "8GiB", "8GiB", config, activation_bytes=3 * GIB)
    assert budgets.device_bytes == 5 * GIB
    held = Budgets(CPU, "auto", "8GiB", config, held=HeldBytes(device=2 * GIB)).device_bytes
    free = Budgets(CPU, "auto", "8GiB", config).device_bytes
    assert held - free == pytest.approx(2 * GIB, rel=0.1)

"""from_pretrained against transformers' own: names, ties, dtypes, buffers, and what is refused."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch
from family_table import FAMILIES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from wsm_ext.checkpoints.image import CheckpointError
from wsm_ext.hf.building import build_model, prepare
from wsm_ext.hf.hub import resolve_folder
from wsm_ext.hf.synthetic import make_llama_checkpoint
from wsm_ext.pretrained import from_pretrained

TINY = {"layers": 6, "hidden": 128, "intermediate": 352, "heads": 4, "kv_heads": 2, "vocab": 128}
# 2 MiB is the least that a block of device memory costs, and holds 1 MiB: three layers in bfloat16.
BUDGETS = {"device": "cpu", "device_memory": "2MiB", "host_memory": "512KiB"}
IDS = torch.arange(1, 11)[None]


@pytest.fixture
def folder(tmp_path):
    return make_llama_checkpoint(tmp_path / "model", shards=1, **TINY)


def resident(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def rewrite(folder, change):
    """Let `change` edit the tensors of a checkpoint of one file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def all_tensors(folder):
    return load_file(folder / "model.safetensors")


def tensor_of(folder, name):
    return all_tensors(folder)[name]


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def logits_of(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def generate(model):
    with torch.inference_mode():
        return model.generate(
            input_ids=IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
        )


# Streamed against resident


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shards", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_bits_equal_the_resident_model(tmp_path, shards, tie, dtype):
    folder = make_llama_checkpoint(tmp_path, shards=shards, tie=tie, dtype=dtype, **TINY)
    reference = resident(folder)
    with from_pretrained(folder, **BUDGETS) as model:
        for _ in range(2):
            assert torch.equal(logits_of(model), logits_of(reference))
            assert model.stats()["last_pass"]["disk_bytes"] > 0
        assert torch.equal(generate(model), generate(reference))


def test_a_static_cache_does_not_compile(folder, monkeypatch, caplog):
    def compiled(self, config):
        raise AssertionError("the forward pass was compiled")

    monkeypatch.setattr(LlamaForCausalLM, "get_compiled_call", compiled)
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True
    asked = {"cache_implementation": "static", "compile_config": everywhere, "max_new_tokens": 3}
    with pytest.raises(AssertionError, match="compiled"):
        resident(folder).generate(IDS, **asked)
    with from_pretrained(folder, **BUDGETS) as model, caplog.at_level(logging.WARNING, "wsm_ext"):
        assert model.generate(IDS, **asked).shape == (1, 13)
    assert "runs uncompiled" in caplog.text


# The module that is built


def test_parameters_are_meta_and_buffers_are_the_resident_ones(folder):
    edit_config(
        folder,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    module, checkpoint = prepare(folder)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert set(checkpoint.tensors) == {name for name, _ in module.named_parameters()}
    assert all(image.name == name for name, image in checkpoint.tensors.items())
    assert not module.training
    ours, theirs = dict(module.named_buffers()), dict(resident(folder).named_buffers())
    assert (
        set(ours)
        == set(theirs)
        == {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
    )
    for name, buffer in ours.items():
        assert buffer.dtype == theirs[name].dtype
        assert torch.equal(buffer, theirs[name])


def test_building_a_70b_model_takes_no_memory():
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        num_hidden_layers=80, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_model(config, LlamaForCausalLM, torch.bfloat16)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert sum(parameter.nbytes for parameter in model.parameters()) > 130e9
    assert grown * 1024 < 200e6


def test_the_generation_config_is_loaded(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9], "top_k": 3}')
    module, _ = prepare(folder)
    assert module.generation_config.eos_token_id == [7, 9]
    assert module.generation_config.top_k == 3


def test_auto_class_overrides_the_architecture(folder):
    for chosen in ("LlamaModel", LlamaModel, "AutoModel"):
        rewrite(folder, lambda tensors: tensors.pop("lm_head.weight", None))
        module, checkpoint = prepare(folder, auto_class=chosen)
        assert type(module) is LlamaModel
        assert "layers.0.self_attn.q_proj.weight" in checkpoint.tensors  # the prefix is gone


def test_a_base_model_s_checkpoint_fills_the_whole_model(folder):
    edit_config(folder, tie_word_embeddings=True)
    resident(folder).model.save_pretrained(folder)
    edit_config(folder, architectures=["LlamaForCausalLM"])
    assert "layers.0.self_attn.q_proj.weight" in load_file(folder / "model.safetensors")
    _, checkpoint = prepare(folder)
    assert "model.layers.0.self_attn.q_proj.weight" in checkpoint.tensors


def test_old_tensors_that_transformers_ignores_are_ignored(folder):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    rewrite(folder, add)
    _, checkpoint = prepare(folder)
    assert not any("inv_freq" in name for name in checkpoint.tensors)


def test_of_two_tensors_for_one_parameter_the_first_is_used(folder, caplog):
    rewrite(folder, lambda tensors: tensors.update({"norm.weight": torch.zeros(128).bfloat16()}))
    with caplog.at_level(logging.WARNING, "wsm_ext"):
        prepare(folder)
    assert "model.norm.weight and norm.weight are both model.norm.weight" in caplog.text
    with from_pretrained(folder, **BUDGETS) as model:
        assert torch.equal(logits_of(model), logits_of(resident(folder)))


# Ties


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_resolve_to_the_one_that_is_there(folder, kept):
    edit_config(folder, tie_word_embeddings=True)
    other = {"lm_head.weight", "model.embed_tokens.weight"} - {kept}
    rewrite(folder, lambda tensors: tensors.pop(other.pop()))
    module, checkpoint = prepare(folder)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    extents = {
        checkpoint.tensors[n].extents for n in ("lm_head.weight", "model.embed_tokens.weight")
    }
    assert len(extents) == 1
    with from_pretrained(folder, **BUDGETS) as model:
        assert torch.equal(logits_of(model), logits_of(resident(folder)))


@pytest.mark.parametrize("equal", [True, False])
def test_both_of_a_tied_pair_stay_apart_only_if_they_differ(folder, equal):
    edit_config(folder, tie_word_embeddings=True)

    def both(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not equal:
            tensors["lm_head.weight"][-1, -1] += 1

    rewrite(folder, both)
    reference = resident(folder)
    with from_pretrained(folder, **BUDGETS) as model:
        assert torch.equal(logits_of(model), logits_of(reference))
        assert model.plan.model_bytes == sum(p.nbytes for p in reference.parameters())


# A model of our own: persistent buffers, modules kept in fp32, one parameter under two names


class OwnConfig(PreTrainedConfig):
    model_type = "wsm_test_own"


class Own(PreTrainedModel):
    config_class = OwnConfig
    _keep_in_fp32_modules_strict = ("gate",)

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(8, 8)
        self.gate = nn.Linear(8, 8, bias=False)
        self.twice = nn.Linear(8, 8, bias=False)
        self.twice.weight = self.first.weight
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("whole", torch.zeros((), dtype=torch.int64))
        self.register_buffer("computed", torch.arange(4.0), persistent=False)
        self.post_init()

    def forward(self, x):
        return self.twice(self.gate(self.first(x).float()).to(x.dtype)) + self.computed.sum()


AutoConfig.register("wsm_test_own", OwnConfig)


@pytest.fixture
def own(tmp_path):
    OwnConfig(dtype=torch.bfloat16).save_pretrained(tmp_path)
    save_file(
        {
            "first.weight": torch.randn(8, 8).bfloat16(),
            "first.bias": torch.randn(8).bfloat16(),
            "gate.weight": torch.randn(8, 8),
            "kept": torch.tensor([1.0, 2.0, 3.0]),
            "whole": torch.tensor(41),
        },
        tmp_path / "model.safetensors",
    )
    return tmp_path


def test_persistent_buffers_are_read_and_others_computed(own):
    with from_pretrained(own, auto_class=Own, **BUDGETS) as model:
        assert model.kept.tolist() == [1, 2, 3]
        assert model.whole.item() == 41
        assert model.computed.tolist() == [0, 1, 2, 3]


def test_a_missing_buffer_keeps_its_initial_value_and_is_told(own, caplog):
    rewrite(own, lambda tensors: tensors.pop("kept"))
    with caplog.at_level(logging.WARNING, "wsm_ext"):
        module, _ = prepare(own, auto_class=Own)
    assert "initial values: kept" in caplog.text
    assert module.kept.tolist() == [0, 0, 0]


def test_modules_kept_in_fp32_have_the_dtype_that_transformers_gives_them(own):
    module, _ = prepare(own, auto_class=Own)
    assert module.gate.weight.dtype == torch.float32
    assert module.first.weight.dtype == torch.bfloat16

    def shrink(tensors):
        tensors["gate.weight"] = tensors["gate.weight"].bfloat16()

    rewrite(own, shrink)
    module, checkpoint = prepare(own, auto_class=Own)
    assert module.gate.weight.dtype == checkpoint.tensors["gate.weight"].dtype == torch.float32
    with from_pretrained(own, auto_class=Own, **BUDGETS) as model:
        assert torch.equal(model.fetch("gate.weight"), tensor_of(own, "gate.weight").float())


def test_one_parameter_under_two_names_stays_one(own):
    module, checkpoint = prepare(own, auto_class=Own)
    assert module.twice.weight is module.first.weight
    assert checkpoint.tensors["twice.weight"].extents == checkpoint.tensors["first.weight"].extents


# Casts and conversions


# All stays on the device, some of it, nothing.
HOMES = [{"device_memory": "32MiB"}, {}, {"config": {"home_bytes": 0, "poison": True}}]


@pytest.mark.parametrize("homes", HOMES, ids=["all", "some", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, "float32"])
def test_another_dtype_is_cast_to_wherever_the_weights_live(folder, dtype, homes):
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with from_pretrained(folder, dtype=dtype, **BUDGETS | homes) as model:
        assert model.dtype == reference.dtype
        assert model.plan.streams == ("device_memory" not in homes)
        for _ in range(2):
            assert torch.equal(logits_of(model), logits_of(reference))
        for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
            assert torch.equal(model.fetch(name), reference.get_parameter(name))
        plan = model.plan
        assert plan.model_bytes == sum(tensor.nbytes for tensor in all_tensors(folder).values())
        assert plan.homes_bytes + plan.arena_bytes <= plan.device_budget_bytes
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_config_that_names_another_dtype_casts_as_transformers_does(folder):
    edit_config(folder, dtype="float32")
    with from_pretrained(folder, **BUDGETS) as model:
        assert model.dtype == torch.float32
        assert torch.equal(logits_of(model), logits_of(resident(folder)))
    assert prepare(folder, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_one_tensor_of_another_dtype_is_cast(folder):
    name = "model.layers.2.self_attn.o_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].float() * 1.001}))
    _, checkpoint = prepare(folder)
    assert [n for n, image in checkpoint.tensors.items() if image.arrival] == [name]
    with from_pretrained(folder, **BUDGETS) as model:
        assert torch.equal(logits_of(model), logits_of(resident(folder)))


def test_a_tied_pair_that_is_cast_is_one_tensor(folder):
    edit_config(folder, tie_word_embeddings=True)

    def both(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(folder, both)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    with from_pretrained(folder, dtype=torch.float16, **BUDGETS) as model:
        assert torch.equal(logits_of(model), logits_of(reference))
        assert model.plan.model_bytes == sum(p.nbytes for p in reference.parameters())


def test_a_persistent_buffer_is_cast_too(own):
    rewrite(own, lambda tensors: tensors.update({"kept": torch.tensor([1.5, 2.5, 3.5]).half()}))
    _, checkpoint = prepare(own, auto_class=Own)
    assert checkpoint.tensors["kept"].dtype == torch.bfloat16
    with from_pretrained(own, auto_class=Own, **BUDGETS) as model:
        assert model.kept.dtype == torch.bfloat16
        assert model.kept.tolist() == [1.5, 2.5, 3.5]


@pytest.fixture
def experts(tmp_path):
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_fused_experts_are_read_to_where_they_belong(experts):
    _, checkpoint = prepare(experts)
    image = checkpoint.tensors["model.layers.0.mlp.experts.gate_up_proj"]
    assert (image.shape, len(image.extents), image.arrival) == ((2, 96, 32), 4, None)


def test_experts_of_several_dtypes_are_cast_first(experts):
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    rewrite(experts, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    with from_pretrained(experts, **BUDGETS) as model:
        assert torch.equal(logits_of(model), logits_of(resident(experts)))


def test_experts_that_do_not_fit_together_are_named(experts):
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    rewrite(experts, lambda tensors: tensors.update({name: tensors[name][:40].clone()}))
    with pytest.raises(CheckpointError, match=r"gate_up_proj cannot be made by .*Merge.*w3.weight"):
        prepare(experts)
    rewrite(experts, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"gate_up_proj cannot be made by .*Concatenate"):
        prepare(experts)


def test_an_expert_too_few_is_a_wrong_shape(experts):
    def drop(tensors):
        for projection in ("w1", "w2", "w3"):
            del tensors[f"model.layers.0.block_sparse_moe.experts.1.{projection}.weight"]

    rewrite(experts, drop)
    with pytest.raises(CheckpointError, match=r"gate_up_proj \(file \[1, 96, 32\], model \[2, 96"):
        prepare(experts)


@pytest.mark.parametrize("homes", HOMES, ids=["all", "some", "none"])
def test_a_transpose_is_made_on_arrival(tmp_path, homes):
    """The first checkpoints of Qwen3-VL-MoE hold their experts the other way round."""
    family = next(family for family in FAMILIES if family.name == "Qwen3-VL-MoE")
    if family.missing:
        pytest.skip(f"transformers has no {family.missing}")
    family.save(tmp_path)

    def turn(tensors):
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].transpose(1, 2).contiguous()

    rewrite(tmp_path, turn)
    _, checkpoint = prepare(tmp_path)
    assert any(image.arrival for image in checkpoint.tensors.values())
    reference = family.resident(tmp_path, torch.device("cpu"))
    with from_pretrained(tmp_path, **BUDGETS | homes) as model:
        assert torch.equal(logits_of(model), logits_of(reference))


# What is refused


def test_missing_and_surplus_tensors_are_named(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.1.mlp.side_proj.weight"] = torch.ones(2)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        prepare(folder)
    assert "lacks: model.layers.1.mlp.up_proj.weight;" in str(error.value)
    assert "no place for: model.layers.1.mlp.side_proj.weight" in str(error.value)


def test_of_many_missing_tensors_ten_are_named(folder):
    edit_config(folder, num_hidden_layers=8)
    with pytest.raises(CheckpointError, match="and 8 more") as error:
        prepare(folder)
    assert str(error.value).count("model.layers.") == 10


def test_tied_tensors_that_are_both_absent_are_named(folder):
    edit_config(folder, tie_word_embeddings=True)

    def change(tensors):
        del tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"lacks: lm_head.weight, model.embed_tokens.weight"):
        prepare(folder)


def test_wrong_shapes_are_named(folder):
    edit_config(folder, vocab_size=130)
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight \(file \[128, 128\], model \[130, 128\]\)"
    ):
        prepare(folder)


def test_without_a_dtype_in_the_config_the_tensors_decide(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert prepare(folder)[0].dtype == torch.bfloat16


def test_a_name_that_is_no_dtype_is_refused(folder):
    with pytest.raises(ValueError, match="'half-ish': not a dtype"):
        prepare(folder, dtype="half-ish")


def test_unknown_architectures_ask_for_auto_class(folder):
    edit_config(folder, architectures=["LlamaForEverything"])
    with pytest.raises(
        CheckpointError, match=r"'LlamaForEverything' is not a model class.*auto_class"
    ):
        prepare(folder)
    edit_config(folder, architectures=None)
    assert type(prepare(folder)[0]) is LlamaForCausalLM


HOSTILE = [
    *(None, True, -1, 0, 1, 3, 2**31, 2**62, 10**30, -(2**63), 0.5, 1e300, "", "x", "../..", "\0"),
    *([], [1, "a", None], {}, {"a": {"b": []}}, {"rope_type": "x"}, "torch.load", ["Llama"] * 3),
]


def test_a_hostile_config_is_refused_or_loaded_in_bounded_time(folder):
    """Each value of the config by turns, by others of all kinds; then the text itself, cut."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    loaded = refused = 0
    for name in config:
        for value in HOSTILE:
            file.write_text(json.dumps(config | {name: value}))
            begin = time.process_time()  # so that others who are busy do not count
            try:
                prepare(folder)
                loaded += 1
            except CheckpointError:
                refused += 1
            assert time.process_time() - begin < 20, (name, value)
    assert min(loaded, refused) > 50
    text = json.dumps(config)
    for end in range(0, len(text), 37):
        file.write_text(text[:end])
        with pytest.raises(CheckpointError, match=r"config\.json"):
            prepare(folder)


def test_a_config_of_endless_layers_is_refused_before_they_are_built(folder):
    edit_config(folder, num_hidden_layers=10**9, layer_types=None)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 1000000000, and .* tensors"):
        prepare(folder)


# Where the model is


def test_local_paths_need_no_hub(folder, monkeypatch):
    assert resolve_folder(str(folder)) == folder
    with pytest.raises(CheckpointError, match="revision='v1' means nothing"):
        resolve_folder(folder, revision="v1")
    with pytest.raises(CheckpointError, match="is a file: give the model's folder"):
        resolve_folder(folder / "model.safetensors")
    for wrong in ("no/such/folder", "./gone", "/gone", "gone folder"):
        with pytest.raises(CheckpointError, match="no such folder, and not a hub id"):
            resolve_folder(wrong)


def test_hub_ids_go_through_the_hub_client(folder, tmp_path, monkeypatch):
    calls = []

    def snapshot(name, **options):
        calls.append((name, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_folder("owner/name", revision="v1", local_files_only=True) == folder
    ((name, options),) = calls
    assert (name, options["revision"], options["local_files_only"]) == ("owner/name", "v1", True)
    assert {"*.safetensors", "*.json"} <= set(options["allow_patterns"])

    def fail(name, **options):
        raise OSError("no network\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"did not supply it: no network$"):
        resolve_folder("owner/name")


@pytest.fixture
def hub_cache(folder, tmp_path):
    """As the hub client lays it out: blobs, and a snapshot of links to them."""
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / "0123abcd"
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abcd")
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_cache(folder, hub_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))
    with from_pretrained("owner/name", local_files_only=True, **BUDGETS) as model:
        assert torch.equal(logits_of(model), logits_of(resident(folder)))
    with pytest.raises(CheckpointError, match="owner/other: no such folder here, and the hub"):
        resolve_folder("owner/other", local_files_only=True)


def test_offline_a_hub_id_is_found_in_the_cache(hub_cache):
    code = "from wsm_ext.hf.hub import resolve_folder as r\nprint(r('owner/name'))"
    environment = os.environ | {"HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip().endswith("models--owner--name/snapshots/0123abcd")

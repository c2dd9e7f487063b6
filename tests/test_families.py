"""Every family of the table in docs/compatibility.md: streamed bits equal the resident model's."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compatibility import DOCUMENT, families_table, part_of, refusals_table
from families import Family
from family_table import FAMILIES
from refusals import REFUSALS
from torch.utils._pytree import tree_leaves

import wsm_ext as wsm
from wsm_ext.hf.synthetic import make_llama_checkpoint

transformers.utils.logging.disable_progress_bar()

# 2 MiB is the least block of device memory. Nothing stays in it, little stays in host memory, and
# what was released is overwritten.
BUDGETS: dict[str, Any] = {
    "device_memory": "2MiB",
    "host_memory": "512KiB",
    "config": {"home_bytes": 0, "poison": True},
}
NEW_TOKENS = 6
STRATEGIES: dict[str, dict[str, Any]] = {
    "generate": {},
    # Compiled, as generate() would, the resident model gives other bits.
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "beam search": {"num_beams": 3, "num_return_sequences": 2},
    "assisted": {},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders and resident models, each made once."""

    @cache
    def folder(family: Family, dtype: str) -> Path:
        path = tmp_path_factory.mktemp("model")
        return family.save(path, getattr(torch, dtype))

    @cache
    def resident(family: Family, file: str, asked: str, device: torch.device) -> Any:
        return family.resident(folder(family, file), device, dtype=asked)

    return folder, resident


@pytest.fixture
def ordered_offloading(monkeypatch):
    """Transformers' offloaded cache prefetches on a stream of its own. In 5.17 that does not wait
    for what is being offloaded (in 5.23 it does): a race of either model, whatever its weights."""
    prefetch = transformers.cache_utils.Cache.prefetch

    def ordered(kept: Any, *args: Any, **kwargs: Any) -> None:
        kept.prefetch_stream.wait_stream(torch.cuda.default_stream())
        prefetch(kept, *args, **kwargs)

    monkeypatch.setattr(transformers.cache_utils.Cache, "prefetch", ordered)


def tensors(outputs: Any) -> list[torch.Tensor]:
    # What a model remembers of the generation before this forward is no output of it.
    values = [value for key, value in outputs.items() if key != "rope_deltas"]
    found = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    assert found
    assert not any(tensor.isnan().any() for tensor in found)
    return found


def assert_same_bits(ours: Any, theirs: Any) -> None:
    ours, theirs = tensors(ours), tensors(theirs)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def inputs_of(family: Family, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in family.inputs().items()
    }


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    return model.generate(
        **given,
        **options,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def check(family: Family, case: str, device: torch.device, models: Any) -> None:
    folder, resident = models
    file, _, asked = case.partition(" as ")
    if not asked:
        file, asked = "float32", "auto"
    units = case.removeprefix("units ") if case.startswith("units ") else "auto"
    reference = resident(family, file, asked, device)
    inputs = inputs_of(family, device, reference.dtype)
    options = {"dtype": asked, "units": units, "device": device}
    with (
        wsm.from_pretrained(
            folder(family, file), auto_class=family.model, **options, **BUDGETS
        ) as model,
        torch.no_grad(),
    ):
        assert all(unit.streamed_bytes for unit in model.plan.units)
        if case in STRATEGIES:
            how = dict(STRATEGIES[case])
            if case == "assisted":
                how["assistant_model"] = family.build(seed=8).to(device)
            ours, theirs = (generate(m, inputs, **how) for m in (model, reference))
            assert torch.equal(ours.sequences, theirs.sequences)
            assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
            return
        for _ in range(2):
            assert_same_bits(model(**inputs), reference(**inputs))
            assert model.stats()["last_pass"]["h2d_bytes"] > 0


@pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(family, case, id=f"{family.name}-{case}".replace(" ", "_"))
        for family in FAMILIES
        for case in family.cases
    ],
)
def test_streamed_bits_equal_the_resident_model(family, case, device, models, ordered_offloading):
    if family.missing:
        pytest.skip(f"transformers {transformers.__version__} has no {family.missing}")
    if case == "offloaded cache" and device.type == "cpu":
        pytest.skip("the offloaded cache of transformers needs a GPU")
    with warnings.catch_warnings():
        # Mamba reads its children's weights: right all the same, and told.
        warnings.filterwarnings("ignore", message=r"parameter .* was read outside the forward")
        check(family, case, device, models)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.what.replace(" ", "_"))
def test_what_is_refused_says_so(refusal, tmp_path):
    make_llama_checkpoint(
        tmp_path, shards=1, layers=1, hidden=16, intermediate=16, heads=2, kv_heads=2, vocab=16
    )
    with pytest.raises(ValueError, match=refusal.message):
        refusal.attempt(tmp_path)


def test_the_document_has_the_families_and_refusals_that_are_tested():
    text = DOCUMENT.read_text("utf-8")
    hint = "run `make compatibility`"
    assert part_of(text, "families") == families_table(), hint
    assert part_of(text, "refusals") == refusals_table(), hint

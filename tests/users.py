"""What users do to a model, and what it must come to when the model streams.

    python tests/users.py > table.md

Each row is tried by tests/test_users.py, under budgets under which all weights stream and under
budgets under which all stay. The table of docs/streamed-module.md is made of the rows.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import make_net, on_meta, save, tokens
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import wsm_ext as wsm

MIB = 1 << 20
LAYERS = 3
LLAMA = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CONFIG = {"lookahead_units": 0, "poison": True, "chunk_mb": 0.125, "staging_mb": 1}
BUDGETS: dict[str, dict[str, Any]] = {
    "streams": {"device_memory": 22 * MIB, "config": {**CONFIG, "home_bytes": 0}},
    "stays": {"device_memory": 80 * MIB, "config": CONFIG},
}


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert torch.equal(one, other)


class Trial:
    """A streamed module and a resident one, of both kinds, made when they are asked for."""

    def __init__(self, folder: Path, budget: str) -> None:
        self.folder = folder
        self.budget = budget
        self.options = {
            "device": "cpu",
            "host_memory": 4 * MIB,
            "units": "layer",
            **BUDGETS[budget],
        }
        self.x = tokens(2, 5)
        self.ids = torch.arange(1, 9)[None]

    def stream_net(self) -> Any:
        streamed = wsm.stream(
            on_meta(self.resident, layers=LAYERS), self._net_folder, **self.options
        )
        assert streamed.plan.streams == (self.budget == "streams")
        return streamed

    def stream_model(self) -> Any:
        streamed = wsm.from_pretrained(self._model_folder, **self.options)
        assert streamed.plan.streams == (self.budget == "streams")
        return streamed

    def load_model(self) -> PreTrainedModel:
        return LlamaForCausalLM.from_pretrained(self._model_folder).requires_grad_(False)

    @functools.cached_property
    def _net_folder(self) -> Path:
        return save(self.resident, self.folder / "net")

    @functools.cached_property
    def _model_folder(self) -> Path:
        torch.manual_seed(1)
        LlamaForCausalLM(LLAMA).save_pretrained(self.folder / "llama")
        return self.folder / "llama"

    @functools.cached_property
    def resident(self) -> Any:
        return make_net(layers=LAYERS).requires_grad_(False)

    @functools.cached_property
    def net(self) -> Any:
        return self.stream_net()

    @functools.cached_property
    def model(self) -> Any:
        return self.stream_model()

    @functools.cached_property
    def resident_model(self) -> Any:
        return self.load_model()

    def check(self) -> None:
        """Whatever was done or refused: the bits are right, and it can be closed."""
        for name, resident, given in (
            ("net", "resident", self.x),
            ("model", "resident_model", self.ids),
        ):
            if name not in self.__dict__:
                continue
            streamed = self.__dict__[name]
            with torch.no_grad():
                found, want = streamed(given), getattr(self, resident)(given)
            same(getattr(found, "logits", found), getattr(want, "logits", want))
            wsm.handle(streamed).close()


@dataclass(frozen=True)
class Row:
    what: str
    outcome: str
    says: str
    run: Callable[[Trial], None]
    kind: type[BaseException] | None = None  # of what refuses
    budgets: tuple[str, ...] = tuple(BUDGETS)


ROWS: list[Row] = []
AS_RESIDENT, REFUSED, NOT_SUPPORTED = "as resident", "refused", "not supported"


def as_resident(what: str, says: str = "", **options: Any) -> Callable[[Any], Any]:
    return _row(what, AS_RESIDENT, says, **options)


def refused(
    what: str, kind: type[BaseException], message: str, **options: Any
) -> Callable[[Any], Any]:
    """The error must have the message, word for word; "... " stands for what differs."""
    return _row(what, REFUSED, message, kind=kind, **options)


def not_supported(what: str, why: str, **options: Any) -> Callable[[Any], Any]:
    return _row(what, NOT_SUPPORTED, why, **options)


def _row(what: str, outcome: str, says: str, **options: Any) -> Callable[[Any], Any]:
    def add(run: Callable[[Trial], None]) -> Callable[[Trial], None]:
        ROWS.append(Row(what, outcome, says, run, **options))
        return run

    return add


# -- running it ------------------------------------------------------------------------------------


@as_resident("`net(x)`, a layer of it alone")
def _(trial: Trial) -> None:
    same(trial.net(trial.x), trial.resident(trial.x))
    hidden = trial.resident.embed(trial.x)
    same(trial.net.layers[1](hidden), trial.resident.layers[1](hidden))


@as_resident("`isinstance(model, LlamaForCausalLM)`, `model.config`, the class's name")
def _(trial: Trial) -> None:
    assert isinstance(trial.model, LlamaForCausalLM)
    assert isinstance(trial.model, wsm.StreamedModule)
    assert trial.model.config.to_dict() == trial.resident_model.config.to_dict()
    assert repr(trial.model) == repr(trial.resident_model)
    assert str(type(trial.model)) == str(LlamaForCausalLM)


@as_resident("`output_hidden_states=True` and other captured outputs")
def _(trial: Trial) -> None:
    options = {"output_hidden_states": True, "output_attentions": True}
    trial.model.set_attn_implementation("eager")
    trial.resident_model.set_attn_implementation("eager")
    one, other = (m(trial.ids, **options) for m in (trial.model, trial.resident_model))
    assert len(one.hidden_states) == LAYERS + 1
    assert len(one.attentions) == LAYERS
    for key in ("hidden_states", "attentions"):
        for found, want in zip(one[key], other[key], strict=True):
            same(found, want)


@as_resident("`generate`, `register_forward_hook` on the model: called for each token")
def _(trial: Trial) -> None:
    seen: list[int] = []
    hook = trial.model.register_forward_hook(lambda *_: seen.append(1))
    options = {"max_new_tokens": 4, "do_sample": False}
    same(
        trial.model.generate(trial.ids, **options),
        trial.resident_model.generate(trial.ids, **options),
    )
    assert len(seen) == 4
    hook.remove()


@as_resident("`net.forward = patched`, also of a module inside")
def _(trial: Trial) -> None:
    for module in (trial.net, trial.net.layers[1]):
        before, calls = module.forward, []

        def patched(x: torch.Tensor, before: Any = before, calls: Any = calls) -> torch.Tensor:
            calls.append(1)
            return before(x)

        module.forward = patched
        same(trial.net(trial.x), trial.resident(trial.x))
        assert calls == [1]
    trial.net.resize(device_memory=trial.options["device_memory"] + MIB)
    same(trial.net(trial.x), trial.resident(trial.x))
    assert calls == [1, 1]


@as_resident("`pipeline(..., model=model)`")
def _(trial: Trial) -> None:
    from transformers import TextGenerationPipeline

    tokenizer = Tokens()
    made = [
        TextGenerationPipeline(model=model, tokenizer=tokenizer)
        for model in (trial.model, trial.resident_model)
    ]
    assert made[0].model is trial.model
    one, other = (
        pipe._forward(
            {
                "input_ids": trial.ids,
                "attention_mask": torch.ones_like(trial.ids),
                "prompt_text": "",
            },
            max_new_tokens=3,
            do_sample=False,
        )
        for pipe in made
    )
    same(one["generated_sequence"], other["generated_sequence"])


class Tokens:
    pad_token_id = eos_token_id = None
    padding_side = "left"
    model_input_names = ("input_ids",)


@as_resident("`generate(..., assistant_model=another)`, both streamed")
def _(trial: Trial) -> None:
    options = {"max_new_tokens": 6, "do_sample": False}
    with trial.stream_model() as another:
        found = trial.model.generate(trial.ids, assistant_model=another, **options)
    want = trial.resident_model.generate(trial.ids, assistant_model=trial.load_model(), **options)
    same(found, want)


@as_resident('`Accelerator(mixed_precision="bf16").prepare(model)`, `unwrap_model`')
def _(trial: Trial) -> None:
    from accelerate import Accelerator

    accelerators = [Accelerator(mixed_precision="bf16", cpu=True) for _ in range(2)]
    models = trial.model, trial.resident_model
    one, other = (a.prepare(m) for a, m in zip(accelerators, models, strict=True))
    same(one(trial.ids).logits, other(trial.ids).logits)
    assert accelerators[0].unwrap_model(one) is trial.model


@as_resident("`torch.compile(net)`, `net.layers[1].compile()`", "each unit by itself")
def _(trial: Trial) -> None:
    same(torch.compile(trial.net, backend="eager")(trial.x), trial.resident(trial.x))
    trial.net.layers[1].compile(backend="eager")
    same(trial.net(trial.x), trial.resident(trial.x))


@refused(
    "`torch.compile(net, fullgraph=True)`",
    Exception,
    "wsm_ext loads and releases weights around this forward, which no graph can contain",
    budgets=("streams",),
)
def _(trial: Trial) -> None:
    torch._dynamo.reset()
    torch.compile(trial.net, backend="eager", fullgraph=True)(trial.x)


# -- training --------------------------------------------------------------------------------------


def lora(**options: Any) -> Any:
    import peft

    torch.manual_seed(5)
    targets = ["q_proj", "v_proj", "down_proj"]
    return peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)


def train(trial: Trial, model: Any) -> list[torch.Tensor]:
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert chosen
    optimizer, seen = torch.optim.AdamW(chosen, lr=1e-2), []
    for step in range(2):
        ids = (trial.ids + step) % LLAMA.vocab_size
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        seen += [loss.detach(), *(parameter.grad.clone() for parameter in chosen)]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, *(parameter.detach() for parameter in chosen)]


def same_training(trial: Trial, streamed: Any, resident: Any) -> None:
    for one, other in zip(train(trial, streamed), train(trial, resident), strict=True):
        same(one, other)


@as_resident("`peft.get_peft_model(model, LoraConfig(...))`, training, `save_pretrained` of it")
def _(trial: Trial) -> None:
    import peft

    streamed = peft.get_peft_model(trial.model, lora())
    same_training(trial, streamed, peft.get_peft_model(trial.load_model(), lora()))
    streamed.save_pretrained(trial.folder / "adapter")
    assert {path.suffix for path in (trial.folder / "adapter").iterdir()} == {
        ".json",
        ".safetensors",
        ".md",
    }
    streamed.unload()


@as_resident("`PeftModel.from_pretrained(model, folder)`, `load_adapter`, `set_adapter`")
def _(trial: Trial) -> None:
    import peft

    for name in ("one", "two"):
        made = peft.get_peft_model(trial.load_model(), lora())
        made.save_pretrained(trial.folder / name)
    models = []
    for model in (trial.model, trial.load_model()):
        made = peft.PeftModel.from_pretrained(model, trial.folder / "one")
        made.load_adapter(trial.folder / "two", adapter_name="two")
        made.set_adapter("two")
        models.append(made)
    same(*(made(trial.ids).logits for made in models))
    models[0].unload()


@as_resident("LoRA with `modules_to_save`", "the copies are resident, and trained")
def _(trial: Trial) -> None:
    import peft

    streamed = peft.get_peft_model(trial.model, lora(modules_to_save=["lm_head"]))
    resident = peft.get_peft_model(trial.load_model(), lora(modules_to_save=["lm_head"]))
    same_training(trial, streamed, resident)
    streamed.unload()
    trial.__dict__.pop("model").close()  # its head is the trained one now


@as_resident("`model.add_adapter(...)`, and `save_pretrained` of its adapters")
def _(trial: Trial) -> None:
    resident = trial.load_model()
    resident.add_adapter(lora())
    trial.model.add_adapter(lora())
    same_training(trial, trial.model, resident)
    trial.model.save_pretrained(trial.folder / "adapter")
    assert (trial.folder / "adapter" / "adapter_model.safetensors").exists()
    assert not (trial.folder / "adapter" / "model.safetensors").exists()
    trial.model.disable_adapters()


@as_resident("`Trainer` over a peft model")
def _(trial: Trial) -> None:
    import peft
    from transformers import Trainer, TrainingArguments

    def run(model: Any, out: str) -> list[torch.Tensor]:
        data = [{"input_ids": torch.arange(i, i + 8)} for i in range(8)]
        data = [{**item, "labels": item["input_ids"]} for item in data]
        arguments = TrainingArguments(
            str(trial.folder / out), max_steps=3, per_device_train_batch_size=2, use_cpu=True
        )
        arguments.disable_tqdm, arguments.report_to = True, []
        made = peft.get_peft_model(model, lora())
        Trainer(made, arguments, train_dataset=data).train()
        return [p.detach().clone() for p in made.parameters() if p.requires_grad]

    resident = run(trial.load_model(), "resident")
    for one, other in zip(run(trial.model, "streamed"), resident, strict=True):
        same(one, other)
    trial.__dict__.pop("model").close()


@refused(
    "training a weight of the base",
    RuntimeError,
    "... is part of the streamed base, which is frozen",
    budgets=("streams",),
)
def _(trial: Trial) -> None:
    trial.net.head.weight.requires_grad_()
    try:
        trial.net(trial.x)
    finally:
        trial.net.head.weight.requires_grad_(False)


@refused(
    "`merge_and_unload`, `merge_adapter`",
    RuntimeError,
    "... cannot be written to",
    budgets=("streams",),
)
def _(trial: Trial) -> None:
    import peft

    made = peft.get_peft_model(trial.model, lora())
    try:
        made.merge_adapter()
    finally:
        made.unload()


# -- weights, names, copies ------------------------------------------------------------------------


@as_resident(
    "`named_parameters()`, `num_parameters()`, `device`, `dtype`, `get_memory_footprint()`"
)
def _(trial: Trial) -> None:
    def described(net: nn.Module) -> list[Any]:
        return [(name, p.shape, p.dtype, p.device) for name, p in net.named_parameters()]

    assert described(trial.model) == described(trial.resident_model)
    for name in ("num_parameters", "get_memory_footprint"):
        assert getattr(trial.model, name)() == getattr(trial.resident_model, name)()
    assert trial.model.device == trial.resident_model.device
    assert trial.model.dtype == trial.resident_model.dtype


@as_resident(
    "`train()`, `eval()`, `requires_grad_(False)`, `zero_grad()`, `apply(...)`, attributes"
)
def _(trial: Trial) -> None:
    assert trial.net.train() is trial.net.eval() is trial.net.requires_grad_(False) is trial.net
    trial.net.zero_grad()
    assert trial.net.apply(lambda inner: inner.register_buffer("more", torch.ones(1))) is trial.net
    trial.net.setting = 3
    trial.net.close()
    assert trial.net.setting == 3
    del trial.__dict__["net"]


@as_resident("`to()`, `float()`, `cuda()` that change nothing; `net.layers[:2]`")
def _(trial: Trial) -> None:
    assert trial.net.to("cpu") is trial.net.float() is trial.net
    assert len(trial.net.layers[:2]) == 2


@refused(
    "`half()`, `to(dtype)`, `to(device)`, `to_empty`, `share_memory` that would change a weight",
    RuntimeError,
    "... is part of a streamed module: its dtype and device were settled by stream()",
)
def _(trial: Trial) -> None:
    buffers = {name: buffer.dtype for name, buffer in trial.net.named_buffers()}
    for convert in (
        lambda: trial.net.half(),
        lambda: trial.net.layers[1].to(torch.bfloat16),
        lambda: trial.net.to("meta"),
        lambda: trial.net.to_empty(device="cpu"),
        lambda: nn.Sequential(trial.net).share_memory(),
    ):
        with pytest.raises(RuntimeError) as refusal:
            convert()
    assert {name: buffer.dtype for name, buffer in trial.net.named_buffers()} == buffers
    raise refusal.value


class Larger(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.before = nn.Linear(2, 2)
        self.base = base
        self.head = nn.Linear(640, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(x))


@as_resident(
    "a larger module that holds it: forward, training, `state_dict()`, loading what is its own",
    "what the state dict has of the base are placeholders",
)
def _(trial: Trial) -> None:
    streamed, resident = Larger(trial.net), Larger(trial.resident)
    for larger in (streamed, resident):
        larger(trial.x).square().sum().backward()
    same(streamed.head.weight.grad, resident.head.weight.grad)
    assert list(streamed.state_dict()) == list(resident.state_dict())
    own = {"head.weight": torch.ones(3, 640)}
    assert (
        len(streamed.load_state_dict(own, strict=False).missing_keys)
        == len(resident.state_dict()) - 1
    )
    same(streamed.head.weight, own["head.weight"])


@as_resident("`stream(net.layers)`, a part of a module")
def _(trial: Trial) -> None:
    net = make_net(layers=LAYERS).requires_grad_(False)
    options = {**trial.options, "host_memory": 40 * MIB}
    with wsm.stream(net.layers, **options) as layers:
        assert layers is net.layers
        assert layers.plan.streams == (trial.budget == "streams")
        same(net(trial.x), trial.resident(trial.x))
    same(net(trial.x), trial.resident(trial.x))


@as_resident("`copy.deepcopy(net.layers[1])`", "a resident copy, if memory holds it")
def _(trial: Trial) -> None:
    made = copy.deepcopy(trial.net.layers[1])
    trial.__dict__.pop("net").close()
    hidden = trial.resident.embed(trial.x)
    same(made(hidden), trial.resident.layers[1](hidden))
    for one, other in zip(made.parameters(), trial.resident.layers[1].parameters(), strict=True):
        same(one, other)
        assert type(one) is nn.Parameter
    for inner, original in zip(made.modules(), trial.resident.layers[1].modules(), strict=True):
        assert vars(inner).keys() == vars(original).keys()
    copy.deepcopy(made).half()
    pickle.dumps(made)


@refused(
    "`copy.deepcopy(net)`, `copy.copy(net)`, `pickle`, `torch.save(net, ...)`",
    TypeError,
    "a streamed module cannot be copied or pickled: its weights are in ...",
)
def _(trial: Trial) -> None:
    for clone in (
        copy.copy,
        pickle.dumps,
        lambda net: torch.save(net, io.BytesIO()),
        lambda net: pickle.dumps(net.layers[1]),
        lambda net: copy.deepcopy(Larger(net)),
        copy.deepcopy,
    ):
        with pytest.raises(TypeError) as refusal:
            clone(trial.net)
        assert str(trial.folder / "net") in str(refusal.value)
    raise refusal.value


@refused(
    "`load_state_dict` that would write a weight of the base, of the module or of one around it",
    RuntimeError,
    "... a weight of a streamed module: its weights are in ...",
)
def _(trial: Trial) -> None:
    around = Larger(trial.net)
    state = trial.resident.state_dict()
    for load in (
        lambda: trial.net.layers[1].load_state_dict(trial.resident.layers[0].state_dict()),
        lambda: trial.net.load_state_dict({"head.weight": state["head.weight"]}, strict=False),
        lambda: around.load_state_dict(Larger(trial.resident).state_dict()),
        lambda: trial.net.load_state_dict(state, assign=True),
        lambda: trial.net.load_state_dict(make_net(seed=5, layers=LAYERS).state_dict()),
    ):
        with pytest.raises(RuntimeError) as refusal:
            load()
        assert str(trial.folder / "net") in str(refusal.value)
    raise refusal.value


@refused(
    "`torch.save(net.state_dict(), ...)`",
    TypeError,
    "... cannot be pickled or copied",
    budgets=("streams",),
)
def _(trial: Trial) -> None:
    torch.save(trial.net.state_dict(), io.BytesIO())


@refused(
    "`safetensors.torch.save_file(net.state_dict(), ...)`, `weight.data_ptr()`",
    RuntimeError,
    "... is streamed and has no storage of its own",
    budgets=("streams",),
)
def _(trial: Trial) -> None:
    file = trial.folder / "saved.safetensors"
    try:
        save_file(trial.net.state_dict(), file)
    finally:
        assert not file.exists()


@refused(
    "`model.save_pretrained(...)`, `push_to_hub`, of a module inside too",
    RuntimeError,
    "save_pretrained() is for a module with its weights in memory ...",
)
def _(trial: Trial) -> None:
    out = trial.folder / "saved"
    for save_it in (trial.model.push_to_hub, trial.model.model.save_pretrained):
        with pytest.raises(RuntimeError, match="is for a module with its weights in memory"):
            save_it(str(out))
    try:
        trial.model.save_pretrained(out)
    finally:
        assert not out.exists()


@refused(
    "`model.resize_token_embeddings(n)`, unless n is the size",
    RuntimeError,
    "resize_token_embeddings(600) would change weights of a streamed module",
)
def _(trial: Trial) -> None:
    table = trial.model.resize_token_embeddings(LLAMA.vocab_size)
    assert table is trial.model.resize_token_embeddings() is trial.model.get_input_embeddings()
    try:
        trial.model.resize_token_embeddings(600)
    finally:
        assert trial.model.config.vocab_size == LLAMA.vocab_size


# -- streaming it, closing it ----------------------------------------------------------------------


@refused(
    "`stream(...)` of it again, of a module inside, or of one around it",
    ValueError,
    "... streamed already",
)
def _(trial: Trial) -> None:
    net, folder = trial.net, trial.folder / "net"
    for again in (net.layers, net.layers[1], nn.Sequential(net), net):
        with pytest.raises(ValueError) as refusal:
            wsm.stream(again, folder, device="cpu")
    raise refusal.value


@refused(
    "a forward after `close()`, where the parameters were on meta before",
    RuntimeError,
    "the stream of this module was closed, and its weights are in ...",
)
def _(trial: Trial) -> None:
    net = trial.__dict__.pop("net", None) or trial.stream_net()
    net.close()
    net(trial.x)


@refused(
    "`close()` while another class stands on top, as `torch.nn.utils.parametrize` puts one",
    RuntimeError,
    "the class of the streamed module has been changed to ...",
)
def _(trial: Trial) -> None:
    trial.net.scale = nn.Parameter(torch.ones(2))
    parametrize.register_parametrization(trial.net, "scale", nn.Identity())
    try:
        trial.net.close()
    finally:
        parametrize.remove_parametrizations(trial.net, "scale")


@refused(
    "`close()`, `resize()` inside a forward",
    RuntimeError,
    "... between passes, not inside a forward",
    budgets=("streams",),
)
def _(trial: Trial) -> None:
    hook = trial.net.layers[1].register_forward_hook(lambda *_: trial.net.close())
    try:
        trial.net(trial.x)
    finally:
        hook.remove()


@not_supported("`type(model) is LlamaForCausalLM`", "it is a subclass while it streams")
def _(trial: Trial) -> None:
    assert type(trial.model) is not LlamaForCausalLM
    trial.model.close()
    assert type(trial.__dict__.pop("model")) is LlamaForCausalLM


@not_supported(
    "`super(self.__class__, self)` in a class of your own",
    "it recurses, as in any class that has a subclass: write `super()`",
)
def _(trial: Trial) -> None:
    class Own(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super(self.__class__, self).forward(x)

    net = Own(nn.Linear(512, 512), nn.Linear(512, 512)).requires_grad_(False)
    with wsm.stream(net, device="cpu", device_memory=8 * MIB, host_memory=8 * MIB):
        try:
            net(torch.ones(1, 512))
        except RecursionError:
            return
    raise AssertionError("it is supported")


@not_supported(
    "`net.stats()`, `net.plan`, `net.close()` after `close()`",
    "the module is its own again; a `wsm.handle(net)` that was taken before goes on to tell",
)
def _(trial: Trial) -> None:
    handle = wsm.handle(trial.net)
    trial.net(trial.x)
    trial.net.close()
    assert not hasattr(trial.__dict__.pop("net"), "stats")
    handle.close()
    assert handle.stats()["passes"] == (1 if trial.budget == "streams" else 0)
    assert handle.plan.units


@not_supported(
    '`register_buffer("plan", ...)`, or a parameter of such a name, while it streams',
    "torch refuses names that the class has; a child of such a name is taken",
)
def _(trial: Trial) -> None:
    try:
        trial.net.register_buffer("plan", torch.ones(1))
    except KeyError:
        trial.net.stats = nn.Linear(2, 2)
        assert isinstance(trial.net.stats, nn.Linear)
        return
    raise AssertionError("it is supported")


def table() -> str:
    lines = ["| what you do | outcome | |", "|---|---|---|"]
    order = (AS_RESIDENT, REFUSED, NOT_SUPPORTED)
    for row in sorted(ROWS, key=lambda row: order.index(row.outcome)):
        says = (
            f"`{row.kind.__name__}`: {row.says}"
            if row.kind is not None and row.kind is not Exception
            else row.says
        )
        lines.append(f"| {row.what} | {row.outcome} | {says} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

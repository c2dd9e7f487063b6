"""What something else runs or moves is refused by name; what only looks on streams."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import RwkvConfig, RwkvForCausalLM

import wsm_ext as wsm

accelerate = pytest.importorskip("accelerate")
hooks = accelerate.hooks
BUDGETS: dict[str, Any] = {
    "device": "cpu",
    "device_memory": "2MiB",
    "host_memory": "2MiB",
    "config": {"home_bytes": 0, "poison": True},
}
CPU = torch.device("cpu")


def make() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(128, 128), nn.Tanh()) for _ in range(8)]
    return nn.Sequential(*layers).requires_grad_(False)


X = torch.linspace(-1, 1, 256).reshape(2, 128)


def offloaded(module: nn.Sequential) -> None:
    accelerate.cpu_offload(module, execution_device=CPU)


def dispatched(module: nn.Sequential) -> None:
    accelerate.dispatch_model(module, {"": "cpu"}, force_hooks=True)


def one_of_several(module: nn.Sequential) -> None:
    several = hooks.SequentialHook(hooks.ModelHook(), hooks.CpuOffload(CPU))
    hooks.add_hook_to_module(module[3], several)


def in_groups(module: nn.Sequential) -> None:
    diffusers = pytest.importorskip("diffusers")
    diffusers.hooks.apply_group_offloading(module, CPU, CPU, offload_type="leaf_level")


def cast_by_layers(module: nn.Sequential) -> None:
    diffusers = pytest.importorskip("diffusers")
    diffusers.hooks.apply_layerwise_casting(module, torch.float16, torch.float32)


def traced(module: nn.Sequential) -> None:
    module[2] = torch.jit.trace(module[2], X)


def scripted(module: nn.Sequential) -> None:
    module[2] = torch.jit.script(module[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (offloaded, r"^the module \(Sequential\) has a hook of accelerate \(AlignDevicesHook\)"),
        (dispatched, r"has a hook of accelerate \(AlignDevicesHook\).*device_map and offloading"),
        (one_of_several, r"^module '3' has a hook of accelerate \(CpuOffload\), which loads or"),
        (in_groups, r"^module '0.0' has a hook of diffusers \(group_offloading\)"),
        (cast_by_layers, r"has a hook of diffusers \(layerwise_casting\), which moves or casts"),
        (traced, r"^module '2' was compiled by torch.jit.*stream the Python one"),
        (scripted, r"^module '2' was compiled by torch.jit.*stream the Python one"),
    ],
)
def test_what_runs_or_moves_weights_itself_is_refused(
    change: Callable[[nn.Sequential], None], message: str
) -> None:
    module = make()
    change(module)
    with pytest.raises(ValueError, match=message):
        wsm.stream(module, **BUDGETS)


def test_a_scripted_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the module \(RecursiveScriptModule\) was compiled"):
        wsm.stream(torch.jit.script(make()), **BUDGETS)


@pytest.mark.parametrize("change", [offloaded, dispatched, in_groups])
def test_what_the_refusal_advises_works(change: Callable[[nn.Sequential], None]) -> None:
    module, reference = make(), make()
    change(module)
    if change is in_groups:
        for layer in module:
            layer[0]._diffusers_hook.remove_hook("group_offloading", recurse=True)
    else:
        hooks.remove_hook_from_submodules(module)
    with wsm.stream(module, **BUDGETS) as streamed:
        assert torch.equal(streamed(X), reference(X))


def test_hooks_and_scripts_that_have_no_weights_stay() -> None:
    class Doubled(hooks.ModelHook):  # type: ignore[misc]
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output * 2

    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x) + 1

    module, reference = make(), make()
    for each in (module, reference):
        hooks.add_hook_to_module(each[2], Doubled())
        each[3][1] = torch.jit.script(Own())
    with wsm.stream(module, **BUDGETS) as streamed:
        assert torch.equal(streamed(X), reference(X))
    assert torch.equal(module(X), reference(X))


def test_a_class_s_forward_may_be_patched_while_it_streams(monkeypatch: Any) -> None:
    class Layer(nn.Linear):
        pass

    module = nn.Sequential(*(Layer(128, 128) for _ in range(4))).requires_grad_(False)
    with wsm.stream(module, **BUDGETS) as streamed:
        monkeypatch.setattr(Layer, "forward", lambda self, x: nn.Linear.forward(self, x) + 1)
        patched = streamed(X)
    assert torch.equal(patched, module(X))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device_memory", ["2MiB", "64MiB"])
def test_rwkv_s_rescaled_weights(dtype: str, device_memory: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7}
    config = RwkvConfig(**sizes, rescale_every=2, context_length=32, eos_token_id=None)
    model = RwkvForCausalLM(config)
    for value in model.state_dict().values():
        value.add_(0.05 * torch.randn_like(value))
    model.save_pretrained(tmp_path)
    reference = RwkvForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval().requires_grad_(False)
    ids = torch.tensor([[5, 9, 17, 33]])
    budgets = {**BUDGETS, "device_memory": device_memory}
    if device_memory == "64MiB":
        del budgets["config"]
    with torch.no_grad(), wsm.from_pretrained(tmp_path, dtype=dtype, **budgets) as streamed:
        for _ in range(2):
            assert torch.equal(streamed(ids).logits, reference(ids).logits)
        ours, theirs = (m.generate(ids, max_new_tokens=5) for m in (streamed, reference))
        assert torch.equal(ours, theirs)


def test_what_is_still_open_at_the_end_of_the_process_says_nothing() -> None:
    code = (
        "import torch, wsm_ext as wsm\n"
        "net = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(4)))\n"
        "budgets = {'device_memory': '2MiB', 'host_memory': '2MiB'}\n"
        "kept = wsm.stream(net.requires_grad_(False), device='cpu', **budgets)\n"
        "kept(torch.ones(1, 128))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == ""

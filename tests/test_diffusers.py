"""Models of diffusers and timm, streamed from the safetensors that they save."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import wsm_ext as wsm

MIB = 1 << 20
SEED = torch.Generator


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=SEED().manual_seed(sum(shape)))


def flux() -> tuple[nn.Module, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return model, {
        "hidden_states": noise(1, 16, 4),
        "encoder_hidden_states": noise(1, 8, 32),
        "pooled_projections": noise(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": noise(16, 3).abs(),
        "txt_ids": noise(8, 3).abs(),
    }


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return model, {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, 6, 32),
        "pooled_projections": noise(1, 64),
        "timestep": torch.tensor([3]),
    }


def unet() -> tuple[nn.Module, dict[str, Any]]:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return model, {
        "sample": noise(1, 4, 16, 16),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": noise(1, 5, 32),
    }


def import_timm() -> Any:
    """timm imports torchvision for its data sets; its models need next to nothing of it."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip("timm")

    class Names(type):
        def __getattr__(cls, name: str) -> str:
            if name.startswith("_"):
                raise AttributeError(name)
            return name

    class Anything(types.ModuleType):
        __path__ = ()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            made = Names(name, (nn.Module,), {})
            setattr(self, name, made)
            return made

    names = ["", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".utils"]
    names += [".transforms", ".transforms.functional", ".datasets"]
    for name in names:
        sys.modules["torchvision" + name] = made = Anything("torchvision" + name)
        if name:
            parent, _, own = ("torchvision" + name).rpartition(".")
            setattr(sys.modules[parent], own, made)
    try:
        import timm

        return timm
    finally:
        for name in names:
            del sys.modules["torchvision" + name]


def vit() -> tuple[nn.Module, dict[str, Any]]:
    timm = import_timm()
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=64, num_heads=4, num_classes=10
    )
    return model, {"x": noise(2, 3, 32, 32)}


def resnet() -> tuple[nn.Module, dict[str, Any]]:
    return import_timm().create_model("resnet10t", num_classes=10), {"x": noise(1, 3, 64, 64)}


def write(model: nn.Module, folder: Path) -> Path:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return folder / "diffusion_pytorch_model.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "m.safetensors")
    return folder / "m.safetensors"


def tensors(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else getattr(out, "sample", out)


@pytest.mark.parametrize("units", ["layer", "group", "leaf"])
@pytest.mark.parametrize("make", [flux, sd3, unet, vit, resnet])
def test_outputs_and_gradients(
    make: Callable[[], tuple[nn.Module, dict[str, Any]]],
    units: str,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Else cuDNN may choose sums whose order varies from run to run.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(4)
    resident, given = make()
    resident.eval().requires_grad_(False)
    file = write(resident, tmp_path)
    module, _ = make()  # other weights
    module.eval()
    resident.to(device)
    given = {name: value.to(device) for name, value in given.items()}
    config = {"home_bytes": 0, "lookahead_units": 0, "poison": True, "chunk_mb": 0.125}
    with wsm.stream(
        module,
        file,
        device=device,
        device_memory=64 * MIB,
        host_memory=4 * MIB,
        units=units,
        config={**config, "staging_mb": 1},
    ) as streamed:
        assert streamed.plan.homes_bytes == 0
        for _ in range(2):
            with torch.inference_mode():
                assert torch.equal(tensors(streamed(**given)), tensors(resident(**given)))
        first = next(iter(given))
        found = []
        for model in (streamed, resident):
            x = given[first].clone().requires_grad_()
            tensors(model(**{**given, first: x})).square().sum().backward()
            found.append(x.grad)
        assert torch.equal(*found)

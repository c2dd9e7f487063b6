"""A family of transformers' models, in a tiny random configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

_IDS = torch.tensor([[5, 9, 17, 33, 65, 2, 4, 8]])


@dataclass(frozen=True, eq=False)
class Family:
    """One row. `decoding` and `units` name further cases, `casts` pairs of dtypes: file, asked."""

    name: str
    model: str  # the class's name
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]] = lambda: {"input_ids": _IDS}
    generates: bool = True
    decoding: tuple[str, ...] = ()
    units: tuple[str, ...] = ("leaf",)
    casts: tuple[tuple[str, str], ...] = (("float32", "bfloat16"),)

    @property
    def missing(self) -> str | None:
        """What the installed transformers lacks of this family."""
        return next((n for n in (self.model, self.config) if not hasattr(transformers, n)), None)

    @property
    def cases(self) -> list[str]:
        """Names of what is compared with the resident model."""
        return [
            "outputs",
            *(["generate"] if self.generates else []),
            *self.decoding,
            *(f"units {mode}" for mode in self.units),
            *(f"{file} as {asked}" for file, asked in self.casts),
        ]

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 7) -> Any:
        """The model with other values in each tensor, so that no two could be exchanged unseen."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.options)
        config.dtype = dtype
        model = getattr(transformers, self.model)(config).to(dtype).eval()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.05 * torch.randn_like(tensor))
        return model

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        self.build(dtype).save_pretrained(folder)
        return folder

    def resident(self, folder: Path, device: torch.device, **options: Any) -> Any:
        """What transformers loads, with what decides over the last bit as it is when streamed: MKL
        sums in an order that depends on where weights begin, matmul folds if they require grad."""
        model = getattr(transformers, self.model).from_pretrained(folder, **options).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # out of the file's mapping
        return model.requires_grad_(False).to(device)

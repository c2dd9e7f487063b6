"""Small modules for the tests, and their checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

HIDDEN = 384
VOCAB = 640


class Block(nn.Module):
    """A layer whose two halves are the groups of a decoder layer."""

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden, dtype=dtype)
        self.self_attn = nn.Linear(hidden, hidden, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden, dtype=dtype),
            nn.GELU(),
            nn.Linear(4 * hidden, hidden, dtype=dtype),
        )
        self.register_buffer("scale", torch.tensor(0.5, dtype=dtype))
        self.register_buffer("steps", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.self_attn(self.input_layernorm(x))) * self.scale
        return x + self.mlp(x) / (1 + self.steps.sum())


class Net(nn.Module):
    """Embedding, layers, norm, head: about 1.5 million parameters a layer."""

    def __init__(
        self,
        layers: int = 8,
        hidden: int = HIDDEN,
        dtype: torch.dtype = torch.float32,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, hidden, dtype=dtype)
        self.layers = nn.ModuleList(Block(hidden, dtype) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden, dtype=dtype)
        self.head = nn.Linear(hidden, VOCAB, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def make_net(seed: int = 0, **options: object) -> Net:
    torch.manual_seed(seed)
    net = Net(**options).eval()  # type: ignore[arg-type]
    for index, layer in enumerate(net.layers):
        layer.scale.fill_(0.25 + index / 16)
    return net


def on_meta(net: Net, **options: object) -> Net:
    """The same module, its parameters on meta and its buffers real."""
    with torch.device("meta"):
        empty = Net(**options).eval()  # type: ignore[arg-type]
    for (_, real), (prefix, owner) in zip(net.named_modules(), empty.named_modules(), strict=True):
        del prefix
        for key, buffer in real._buffers.items():
            persistent = key not in real._non_persistent_buffers_set
            owner._buffers[key] = torch.zeros_like(buffer) if persistent else buffer.clone()
    return empty


def save(net: nn.Module, folder: Path, shards: int = 1, odd: bool = False) -> Path:
    """Write the module's tensors as safetensors; `odd` shifts all offsets by an odd number."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    seen: dict[int, str] = {}
    for name, tensor in net.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied tensor once
            seen[tensor.data_ptr()] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    metadata = {"pad": "x" * 13} if odd else None
    names = list(tensors)
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        name = (
            "model.safetensors"
            if shards == 1
            else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        )
        save_file(part, folder / name, metadata=metadata)
    return folder


def tokens(batch: int = 2, length: int = 12, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)

"""Orders that are not one cycle: never wrong, learned after one occurrence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import save
from torch import nn

import wsm_ext as wsm

MIB = 1 << 20
HIDDEN = 512  # a layer of 1 MiB
SETTINGS = {"home_bytes": 0, "arena_bytes": 4 * MIB, "poison": True}


class Stacks(nn.Module):
    """An encoder, and a decoder that is called by itself too."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(layers))
        self.decoder = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(layers))

    def forward(self, x: torch.Tensor, plan: list[tuple[str, int]]) -> torch.Tensor:
        for stack, index in plan:
            x = torch.tanh(getattr(self, stack)[index](x))
        return x


ENCODE = [("encoder", i) for i in range(6)]
DECODE = [("decoder", i) for i in range(6)]


@pytest.fixture
def net() -> Stacks:
    torch.manual_seed(0)
    return Stacks()


@pytest.fixture
def streamed(net: Stacks, tmp_path: Path, device: torch.device) -> Any:
    folder = save(net, tmp_path)
    with torch.device("meta"):
        empty = Stacks()
    with (
        torch.no_grad(),
        wsm.stream(
            empty,
            folder,
            device=device,
            units="leaf",
            device_memory="20MiB",
            host_memory="64MiB",
            config=SETTINGS,
        ) as model,
    ):
        yield model


def misses(streamed: Any, net: Stacks, *orders: list[tuple[str, int]]) -> int:
    """Passes in these orders, each compared; how often another unit than the expected was used."""
    device = wsm.handle(streamed)._request.device
    before = streamed.stats()["totals"]["misses"]
    for seed, order in enumerate(orders):
        x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(device)
        expected = net.to(device)(x, order)
        assert torch.equal(streamed(x, order), expected)
    net.to("cpu")
    return int(streamed.stats()["totals"]["misses"]) - before


def test_encoder_once_and_decoder_many_times(streamed: Any, net: Stacks) -> None:
    misses(streamed, net, ENCODE, DECODE, DECODE)
    missed = misses(streamed, net, *[DECODE] * 8)
    assert missed == 0
    # One miss where the encoder begins, one where it ends.
    missed = misses(streamed, net, ENCODE, *[DECODE] * 8)
    assert missed <= 2


def test_layers_skipped_by_early_exit(streamed: Any, net: Stacks) -> None:
    whole = ENCODE + DECODE
    misses(streamed, net, whole, whole)
    missed = misses(streamed, net, whole[:5])
    assert missed == 0  # the skip shows only at the pass after it
    missed = misses(streamed, net, whole)
    assert missed <= 2
    misses(streamed, net, whole[:5], whole)
    missed = misses(streamed, net, whole[:5], whole[:5])
    assert missed <= 2


def test_an_order_that_changes_between_passes(streamed: Any, net: Stacks) -> None:
    there, back = ENCODE + DECODE, (ENCODE + DECODE)[::-1]
    misses(streamed, net, there, there, back)
    # Learned after one occurrence.
    missed = misses(streamed, net, back)
    assert missed <= 1
    missed = misses(streamed, net, back, back)
    assert missed == 0


def test_a_unit_twice_in_a_pass(streamed: Any, net: Stacks) -> None:
    order = [*ENCODE[:4], ENCODE[1], *ENCODE[4:], *DECODE]
    misses(streamed, net, order, order)
    missed = misses(streamed, net, order, order)
    assert missed == 0


def test_any_order_is_right_and_known_after_one_pass(streamed: Any, net: Stacks) -> None:
    import random

    units = ENCODE + DECODE
    misses(streamed, net, units, units)
    order = units[:]
    random.Random(5).shuffle(order)
    missed = misses(streamed, net, order)
    assert 0 < missed <= len(order)
    assert misses(streamed, net, order, order) <= 1  # where the pass before it began

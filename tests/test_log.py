"""The lines of the log, which people read and scripts search."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, make_net, on_meta, save, tokens

import wsm_ext as wsm

MIB = 1 << 20
LAYERS = 6
END_OF_PASS = b"a pass has ended\n"
UNIT = r"(?:layer=\d+|unit=[\w.]+)(?: (?:group|unit)=[\w.]+)?"
PATH = r"\((?:SSD→)?CPU→GPU\)"
FORMS = (
    rf"\[WSM\] prefetch {UNIT} {PATH}",
    rf"\[WSM\] ->GPU {UNIT} {PATH}",
    rf"\[WSM\] {UNIT} timeout, loading immediately \(waited \d+\.\d ms on (?:SSD|H2D|arena)\)",
    r"\[WSM\] Async GPU prefetch: layers \[[^\[\]]+\]",
)


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net(layers=LAYERS)


@pytest.fixture(scope="module")
def folder(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(net, tmp_path_factory.mktemp("net"))


@pytest.fixture
def log(
    net: Net, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., list[list[str]]]:
    """The lines of each of some passes, and last those of the close."""

    def run(
        passes: int = 1,
        verbose: str = "1",
        cached: bool = False,
        units: Any = "layer",
        **config: Any,
    ) -> list[list[str]]:
        monkeypatch.setenv("WSM_VERBOSE", verbose)
        settings = {"home_bytes": 0, "chunk_mb": 1.0, "staging_mb": 8, **config}
        with wsm.stream(
            on_meta(net, layers=LAYERS),
            folder,
            device="cpu",
            units=units,
            device_memory=48 * MIB,
            host_memory=(64 if cached else 8) * MIB,
            config=settings,
        ) as streamed:
            for _ in range(passes):
                with torch.inference_mode():
                    streamed(tokens())
                os.write(2, END_OF_PASS)
        # What was caught is read when nobody writes any more: capfd would lose lines.
        parts = capfd.readouterr().err.split(END_OF_PASS.decode())
        return [part.splitlines() for part in parts]

    return run


def on_demand(**config: Any) -> dict[str, Any]:
    """Nothing runs ahead, so the lines are the same in every run."""
    return {"lookahead_units": 0, "cpu_prefetch_distance": 0, **config}


def without_times(lines: list[str]) -> list[str]:
    return [re.sub(r"waited \d+\.\d ms", "waited T ms", line) for line in lines]


def test_a_load_on_demand(log: Callable[..., list[list[str]]]) -> None:
    first, second, end = log(passes=2, **on_demand())
    names = ["unit=embed", *(f"layer={i}" for i in range(LAYERS)), "unit=norm", "unit=head"]
    expected = []
    for name in names:
        expected.append(f"[WSM] ->GPU {name} (SSD→CPU→GPU)")
        expected.append(f"[WSM] {name} timeout, loading immediately (waited T ms on SSD)")
    assert without_times(first) == without_times(second) == expected
    assert not end


def test_what_the_cache_has_comes_from_the_cpu(log: Callable[..., list[list[str]]]) -> None:
    first, second, _ = log(passes=2, cached=True, **on_demand())
    assert "[WSM] ->GPU layer=0 (SSD→CPU→GPU)" in first
    assert "[WSM] ->GPU layer=0 (CPU→GPU)" in second
    assert not [line for line in second if "SSD→" in line]


def test_groups_are_named(log: Callable[..., list[list[str]]]) -> None:
    (first, _) = log(units="group", **on_demand())
    assert "[WSM] ->GPU layer=0 group=attn (SSD→CPU→GPU)" in first
    assert "[WSM] ->GPU layer=5 group=mlp (SSD→CPU→GPU)" in first
    (line,) = [line for line in without_times(first) if "layer=3 group=attn timeout" in line]
    assert line == "[WSM] layer=3 group=attn timeout, loading immediately (waited T ms on SSD)"


def test_prefetches(log: Callable[..., list[list[str]]]) -> None:
    passes = log(passes=4, lookahead_units=3)
    lines = [line for part in passes for line in part]
    for layer in range(LAYERS):
        assert f"[WSM] prefetch layer={layer} (SSD→CPU→GPU)" in lines
    assert "[WSM] prefetch unit=head (SSD→CPU→GPU)" in lines
    ahead = {line for line in lines if "Async" in line}
    order = ["embed", *map(str, range(LAYERS)), "norm", "head"]
    around = order * 2
    assert ahead
    assert ahead <= {
        f"[WSM] Async GPU prefetch: layers [{', '.join(around[i + 1 : i + 4])}]"
        for i in range(len(order))
    }
    # While layer 0 runs, layer 3 has yet to come: there is no room for it before.
    assert "[WSM] Async GPU prefetch: layers [1, 2, 3]" in ahead


@pytest.mark.parametrize("units", ["layer", "group", "leaf"])
@pytest.mark.parametrize("config", [{}, {"lookahead_units": 0}, {"lookahead_units": 2}])
def test_every_line_has_a_form_of_the_documentation(
    units: str, config: dict[str, Any], log: Callable[..., list[list[str]]]
) -> None:
    passes = log(passes=2, units=units, **config)
    assert passes[0]
    for line in [line for part in passes for line in part]:
        assert any(re.fullmatch(form, line) for form in FORMS), line


def test_weights_in_ram_do_not_come_from_a_drive(capfd: pytest.CaptureFixture[str]) -> None:
    config = {"home_bytes": 0, "chunk_mb": 1.0, "verbose": True, **on_demand()}
    own = make_net(layers=LAYERS)
    memory = {"device_memory": "24MiB", "host_memory": "8MiB"}
    with wsm.stream(own, device="cpu", config=config, **memory), torch.inference_mode():
        own(tokens())
    lines = capfd.readouterr().err.splitlines()
    assert "[WSM] ->GPU layer=2 (CPU→GPU)" in lines
    assert not [line for line in lines if "SSD→" in line]


@pytest.mark.parametrize("verbose", ["0", ""])
def test_silence(verbose: str, log: Callable[..., list[list[str]]]) -> None:
    assert not any(log(passes=2, verbose=verbose))

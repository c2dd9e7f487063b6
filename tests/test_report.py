import io
import json
import types

import pytest
import torch
from rich.console import Console

from wsm_ext.commands import report

CPU = torch.device("cpu")
PLAN = dict.fromkeys(report.PLAN_KEYS, 0) | {"warnings": ["the cache shrank"]}


class Model:
    """Answers like a streamed model whose passes cost what `costs` says."""

    def __init__(self, *costs):
        self.costs = list(costs)
        self.calls = []
        self.plan = types.SimpleNamespace(**PLAN)

    def __call__(self, **inputs):
        self.calls.append(inputs)
        self.cost = self.costs.pop(0)

    def stats(self):
        disk, h2d, stall = self.cost
        return {
            "passes": len(self.calls),
            "last_pass": {
                "seconds": 9.0,
                "disk_bytes": disk,
                "disk_read_bytes": disk,
                "h2d_bytes": h2d,
                "stall_seconds": {"disk": stall, "h2d": 0.0},
            },
        }


def run(model, **changes):
    settings = {"device": CPU, "vocab": 50, "batch": 2, "tokens": 6, "repeat": 1} | changes
    return report.run_prefills(model, **settings)


def test_a_prefill_is_one_forward_without_cache_over_random_tokens():
    model = Model((1, 2, 0.0), (1, 2, 0.0))
    run(model, repeat=2)
    first, second = model.calls
    ids = first.pop("input_ids")
    assert first == {"use_cache": False, "logits_to_keep": 1}
    assert ids.shape == (2, 6)
    assert ids.unique().numel() > 1
    assert 0 <= ids.min() <= ids.max() < 50
    assert torch.equal(ids, second["input_ids"])


def test_figures_are_those_of_all_passes():
    result = run(Model((10, 100, 0.5), (30, 300, 0.1), (20, 200, 0.0)), repeat=3)
    for entry, seconds in zip(result.passes, (4.0, 1.0, 3.0), strict=True):
        assert entry["seconds"] > 0
        assert entry["seconds"] != 9.0  # measured here, not the engine's
        entry["seconds"] = seconds
    assert result.first_seconds == 4.0
    assert result.median_seconds == 3.0
    assert result.tokens_per_second == 12 / 3.0
    assert result.link_bytes("disk") == 20
    assert result.link_gb_per_second("h2d") == pytest.approx(600 / 8.0 / 1e9)
    assert result.stall_seconds() == {"disk": pytest.approx(0.2), "h2d": 0.0}
    assert result.rss_peak_bytes > 1e6
    assert result.device_peak_bytes is None


@pytest.mark.parametrize("key", ["batch", "tokens", "repeat"])
def test_nothing_runs_without_batch_tokens_or_repeat(key):
    model = Model((1, 1, 0.0))
    with pytest.raises(ValueError, match=rf"{key}.*\(0\).*at least 1"):
        run(model, **{key: 0})
    assert not model.calls


def test_the_table_shows_every_figure():
    gpu = {"gpu_utilisation_percent": 70.0, "sm_clock_mhz": 1980.0, "power_w": 350.0}
    result = run(Model((2_000_000_000, 1 << 30, 0.25)), gpu=lambda: gpu)
    result.passes[0]["seconds"] = 0.5
    result.device_peak_bytes = 3 << 30
    out = io.StringIO()
    report.print_prefills(Console(file=out, width=100), result, load_seconds=1.25)
    text = " ".join(out.getvalue().replace("│", " ").split())
    for part in (
        "prefill of 2 x 6 tokens, 1 times",
        "load 1.25 s",
        "time to first token 0.500 s",
        "tokens/s 24.0",
        "disk to host 4.00 GB/s, 1.9 GiB a pass",
        "host to device 2.15 GB/s, 1.0 GiB a pass",
        "stalled on disk 0.250 s a pass",
        "peak GPU memory (torch) 3.0 GiB",
        "peak memory of the process",
        "GPU utilisation 70 % mean, 70 % peak",
        "SM clock 1980 MHz mean",
        "power 350 W mean",
    ):
        assert part in text


def test_the_document_says_what_ran_where_and_when(tmp_path):
    model = Model((10, 100, 0.0))
    result = run(model)
    content = report.document(["wsm", "prefill"], CPU, model, prefill=result.as_dict())
    report.write_json(tmp_path / "out.json", content)
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["command"] == ["wsm", "prefill"]
    assert read["date"].endswith("+00:00")
    assert read["versions"]["torch"] == torch.__version__
    assert read["hardware"]["cores"] > 0
    assert read["hardware"]["memory_bytes"] > 1 << 28
    assert read["plan"]["warnings"] == ["the cache shrank"]
    assert read["stats"]["passes"] == 1
    assert read["prefill"]["passes"][0]["disk_bytes"] == 10

"""Draws recorded results as SVG, for the README and the docs.

    python bench/chart.py bench/results/DATE-h100-peers.json --out docs/peers.svg
    python bench/chart.py bench/results/DATE-h100-cases.json --out docs/cases.svg
    python bench/chart.py bench/results/DATE-h100-budgets.json --out docs/budgets.svg

What is drawn follows from the record: peers as bars of GB/s, cases as how far each figure is from
its bar, budgets as the time of a pass by the share of the model in RAM. The background is
transparent, and the colours can be read on white and on black.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TEXT = "#818b98"
OURS = "#2f81f7"
OTHERS = "#9198a1"
MISSED = "#d9822b"
SHAPE = "1x2048"


def _figure(rows: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "wsm",  # the same file from the same record
            "font.family": "sans-serif",
            "font.size": 10,
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
        }
    )
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.32 * rows), layout="constrained")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(TEXT)
    axes.tick_params(left=False)
    return figure, axes


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})


def _where(record: dict[str, Any]) -> str:
    environment = record["environment"]
    gpu = environment["gpu"]
    return f"{gpu['name'] if gpu else 'no GPU'}, {environment['date'][:10]}"


def draw_peers(record: dict[str, Any], out: Path, shape: str = SHAPE) -> None:
    """GB/s of the layers' bytes over the time of a forward, the fastest on top."""
    rates = {}
    for name, peer in record["results"].items():
        runs = peer.get("runs", {})
        # Those that read the disk ran the first shape alone: the disk is their limit in any.
        run = runs.get(shape) or next(iter(runs.values()), None)
        if run and name != "resident":
            rates[name] = run["layers_GB_per_s"]
    if not rates:
        raise ValueError(f"the record has no peer with a run of {shape}")
    names = sorted(rates, key=lambda name: rates[name])
    figure, axes = _figure(len(names))
    colours = [OURS if name.startswith("wsm") else OTHERS for name in names]
    bars = axes.barh(names, [rates[name] for name in names], color=colours, height=0.7)
    axes.bar_label(bars, fmt="%.1f", padding=4, color=TEXT)
    layers = record["checkpoint"]["layers"]
    axes.set_xlabel(f"GB/s of weights through a forward of {shape} tokens, {layers} layers")
    axes.set_title(_where(record), loc="left", fontsize=9)
    _save(figure, out)


def draw_cases(records: list[dict[str, Any]], out: Path) -> None:
    """Each case's figure over its bar, so that 1 is the bar and more is better."""
    verdicts = {}
    for record in records:
        verdict = record["results"].get("verdict")
        if verdict and verdict["figure"] is not None:
            verdicts[verdict["case"]] = verdict
    if not verdicts:
        raise ValueError("the records have no case with a figure")
    rows = [verdicts[number] for number in sorted(verdicts, reverse=True)]
    values = []
    for row in rows:
        sense, bar = row["bar"].split()[:2]
        values.append(
            row["figure"] / float(bar) if sense == ">=" else float(bar) / max(row["figure"], 1e-9)
        )
    figure, axes = _figure(len(rows))
    labels = [f"{row['case']}  {row['what']}" for row in rows]
    colours = [OURS if row["verdict"] == "met" else MISSED for row in rows]
    values = [min(value, 2.0) for value in values]
    axes.barh(labels, values, color=colours, height=0.7)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        text = f"{row['figure']:.4g} (bar {row['bar']})"
        axes.text(max(value, 1.0) + 0.04, place, text, va="center")
    axes.axvline(1.0, color=TEXT, linewidth=1)
    axes.set_xlim(0, 2.6)
    axes.set_xlabel("how far past its bar (1: at it; cut off at 2)")
    axes.set_title(_where(records[0]), loc="left", fontsize=9)
    _save(figure, out)


def draw_budgets(record: dict[str, Any], out: Path) -> None:
    """Seconds of a pass by the share in RAM: measured, the slowest link alone, LRU simulated."""
    runs = record["results"]["runs"]
    if not runs:
        raise ValueError("the record has no run")
    shares = [run["share"] for run in runs]
    figure, axes = _figure(8)
    floors = [max(run["floors"].values()) for run in runs]
    axes.plot(shares, [run["simulated_lru_s"] for run in runs], "--", color=MISSED, label="LRU")
    axes.plot(shares, floors, color=OTHERS, label="the slowest link alone")
    measured = [run["seconds_per_pass"] for run in runs]
    axes.plot(shares, measured, "o", color=OURS, label="wsm, measured")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("% of the model in RAM")
    axes.set_ylabel("seconds a pass", color=TEXT)
    axes.legend(frameon=False)
    axes.set_title(_where(record), loc="left", fontsize=9)
    _save(figure, out)


def draw(records: list[dict[str, Any]], out: Path) -> None:
    """By what was recorded."""
    if records[0]["benchmark"] == "peers":
        draw_peers(records[0], out)
    elif records[0]["benchmark"] == "budgets":
        draw_budgets(records[0], out)
    else:
        draw_cases(records, out)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="of peers.py, forward.py, budgets.py")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    records = [record for path in arguments.results for record in json.loads(path.read_text())]
    draw(records, arguments.out)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

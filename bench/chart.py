"""Draws recorded results as SVG, for the README and the docs.

    python bench/chart.py bench/results/DATE-h100-peers.json --out docs/peers.svg
    python bench/chart.py bench/results/DATE-h100-cases.json --out docs/cases.svg
    python bench/chart.py bench/results/DATE-h100-budgets.json --out docs/budgets.svg

What is drawn follows from the record: peers as bars of seconds, a panel for each shape, cases as
how far each figure is from its bar, budgets as the time of a pass by the share of the model in RAM.
The background is transparent, and the colours can be read on white and on black.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

TEXT = "#757d87"  # the same contrast to GitHub's light and dark background
OURS = "#2f81f7"
OTHERS = "#9198a1"
MISSED = "#d9822b"
CUT = 2.5  # bars longer than so many times the median are cut off


def _pyplot() -> Any:
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

    return pyplot


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(TEXT)
    axes.tick_params(left=False)


def _figure(rows: int) -> tuple[Any, Any]:
    figure, axes = _pyplot().subplots(figsize=(8, 0.8 + 0.32 * rows), layout="constrained")
    _plain(axes)
    return figure, axes


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})


def _where(record: dict[str, Any]) -> str:
    environment = record["environment"]
    gpu = environment["gpu"]
    return f"{gpu['name'] if gpu else 'no GPU'}, {environment['date'][:10]}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _tokens(shape: str) -> str:
    batch, tokens = shape.split("x")
    count = tokens if batch == "1" else f"{batch} x {tokens}"
    return f"{count} token" + "s" * (count != "1")


def _peers_panel(axes: Any, shape: str, rows: list[str], times: dict[str, float]) -> None:
    """Seconds of one shape, in the order of the rows. What holds all on the GPU is a line."""
    _plain(axes)
    resident = times.get("resident")
    shown = {name: seconds for name, seconds in times.items() if name in rows}
    cut = CUT * statistics.median(shown.values())
    longest = max(min(seconds, cut) for seconds in shown.values())
    axes.set_xlim(0, 1.45 * longest)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    for place, name in enumerate(rows):
        if name not in shown:
            continue
        seconds, ours = shown[name], name.startswith("wsm")
        length = min(seconds, cut)
        ends = [(0.0, length)]
        if seconds > cut:  # a gap says that the bar goes on
            ends = [(0.0, 0.9 * length), (0.93 * length, 0.07 * length)]
        axes.broken_barh(ends, (place - 0.35, 0.7), color=OURS if ours else OTHERS, linewidth=0)
        axes.annotate(
            _seconds(seconds),
            (length, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=OURS if ours else TEXT,
            weight="bold" if ours else "normal",
        )
    title = _tokens(shape)
    if resident:
        axes.axvline(resident, color=MISSED, linewidth=1.2, linestyle="--")
        title += f"\nall on the GPU: {_seconds(resident)}"
    axes.set_title(title, loc="left", fontsize=9)
    axes.locator_params(axis="x", nbins=4)


def draw_peers(record: dict[str, Any], out: Path) -> None:
    """Seconds of a forward by project, a panel for each shape, the fastest on top."""
    panels: dict[str, dict[str, float]] = {}
    for name, peer in record["results"].items():
        for shape, run in peer.get("runs", {}).items():
            panels.setdefault(shape, {})[name] = run["seconds_per_pass"]["median"]
    panels = {shape: times for shape, times in panels.items() if set(times) - {"resident"}}
    if not panels:
        raise ValueError("the record has no peer with a run")
    totals: dict[str, list[float]] = {}
    for times in panels.values():
        for name in set(times) - {"resident"}:
            totals.setdefault(name, []).append(times[name] / statistics.median(times.values()))
    # The slowest is the lowest row.
    rows = sorted(totals, key=lambda name: (-statistics.mean(totals[name]), name))
    figure, all_axes = _pyplot().subplots(
        1,
        len(panels),
        figsize=(8.6, 1.3 + 0.31 * len(rows)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, (shape, times) in zip(all_axes[0], panels.items(), strict=True):
        _peers_panel(axes, shape, rows, times)
    first = all_axes[0][0]
    first.set_yticks(range(len(rows)), rows)
    for label in first.get_yticklabels():
        if label.get_text().startswith("wsm"):
            label.set_color(OURS)
            label.set_fontweight("bold")
    made = record["checkpoint"]
    what = (
        f"seconds a forward, less is better · {made['layers']} layers of {made['preset'].upper()}"
    )
    figure.supxlabel(f"{what} shape · {_where(record)}", fontsize=9, color=TEXT)
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
    """Seconds of a pass by the share in RAM: measured, and the slowest link alone."""
    runs = record["results"]["runs"]
    if not runs:
        raise ValueError("the record has no run")
    shares = [run["share"] for run in runs]
    figure, axes = _figure(8)
    floors = [max(run["floors"].values()) for run in runs]
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

"""The bars that the cases are measured against, on an H100 with layers of 70B shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    what: str
    sense: str  # ">=" or "<="
    value: float
    unit: str = ""

    def met_by(self, figure: float) -> bool:
        return figure >= self.value if self.sense == ">=" else figure <= self.value

    def __str__(self) -> str:
        return f"{self.sense} {self.value:g}{self.unit}"


BARS = {
    1: Bar("all layers from RAM, 1x1 and 1x2048: bytes/s over the link's", ">=", 0.985),
    2: Bar("compute-bound, 8x2048: time over the resident model's", "<=", 1.02),
    3: Bar("16 GiB of device memory in all, 1x2048: time over diffusers leaf", "<=", 0.40),
    4: Bar("cold disk, no host cache: bytes/s over the best direct read", ">=", 0.96),
    5: Bar("half in the host cache: pass time over disk bytes / disk rate", "<=", 1.04),
    6: Bar("cold process to first output, over file / disk rate + import torch", "<=", 1.15),
    7: Bar("from tmpfs, staging of at most 1 GiB: bytes/s over the link's", ">=", 0.85),
    8: Bar("pinning: GiB/s over cudaHostAlloc's", ">=", 6),
    9: Bar("everything resident, 1x1: time of the wrapper over the plain model's", "<=", 1.005),
    10: Bar("host time of acquire, swap and release of a unit", "<=", 15, " us"),
    11: Bar("leaf units from RAM, 1x1: peak GPU memory, at 0.95 of the link", "<=", 1.4, " GiB"),
    12: Bar("GPU busy in case 2", ">=", 0.98),
}


def judge(number: int, results: dict[str, Any]) -> dict[str, Any]:
    """The verdict on a case: its figure against its bar, and what else the case demands."""
    bar = BARS[number]
    out: dict[str, Any] = {"case": number, "what": bar.what, "bar": str(bar)}
    if "skipped" in results or "failed" in results:
        why = results.get("skipped") or results["failed"]
        return {
            **out,
            "figure": None,
            "verdict": "skipped" if "skipped" in results else "failed",
            "why": why,
        }
    figure = float(results["figure"])
    # Conditions beside the bar, by name: a figure reached by breaking one of them is no figure.
    broken = [name for name, holds in results.get("conditions", {}).items() if not holds]
    met = bar.met_by(figure) and not broken
    verdict = "met" if met else "MISSED" + (f" ({'; '.join(broken)})" if broken else "")
    return {**out, "figure": figure, "verdict": verdict}


def rows(verdicts: list[dict[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """For a table: case, what, figure, bar, verdict."""
    out = []
    for one in verdicts:
        figure = "-" if one["figure"] is None else f"{one['figure']:.4g}"
        verdict = one["verdict"] + (f": {one['why']}" if "why" in one else "")
        out.append((str(one["case"]), one["what"], figure, one["bar"], verdict))
    return out

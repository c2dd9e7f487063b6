"""The counters that `stats()` shows, over all engines of a stream."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..planning.plan import PlanSummary
from .integrity import Checker, Counts
from .replanner import Replanner
from .session import Session


class Figures:
    def __init__(self, checker: Checker | None) -> None:
        self._checker = checker
        self._passes = 0  # of the engines before this one
        self._totals: dict[str, Any] = {}
        self.last: dict[str, Any] = {}  # what was taken last

    def take(self, session: Session, plan: PlanSummary, planner: Replanner) -> dict[str, Any]:
        engine, planned = session.engine, session.planned.plan
        plan.update(engine.steady_passes())
        memory = engine.memory()
        self.last = {
            "passes": self._passes + engine.passes,
            "memory": {
                "device_bytes": planned.device_bytes,
                "device_peak_bytes": planned.device_bytes,
                "device_budget_bytes": plan.device_budget_bytes,
                "buffer_bytes": planner.buffer_bytes,
                "user_bytes": session.swapper.user_bytes,
                "host_bytes": memory.host_bytes,
                "host_pinned_bytes": memory.host_pinned_bytes,
                "host_peak_bytes": memory.host_peak_bytes,
                "host_budget_bytes": planned.host_budget_bytes,
            },
            "last_pass": engine.last_pass(),
            "totals": _add(self._totals, engine.totals()),
            "readers": engine.readers(),
            "outside_reads": {
                "count": session.swapper.outside_reads.count,
                "bytes": session.swapper.outside_reads.nbytes,
            },
            "verified": asdict(self._checker.counts if self._checker else Counts()),
            "warnings": list(dict.fromkeys(plan.warnings + engine.warnings)),
        }
        return dict(self.last)

    def carry(self, session: Session) -> None:
        """Another engine comes after the session's, and is counted on top of it."""
        self._passes += session.engine.passes
        self._totals = _add(self._totals, session.engine.totals())


def _add(counts: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Sums of counters, those in nested dicts too."""
    if not counts:
        return more
    return {
        key: _add(counts[key], value) if isinstance(value, dict) else counts[key] + value
        for key, value in more.items()
    }

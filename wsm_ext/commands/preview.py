"""What `wsm plan` tells of a model: its plan, and the passes that it should give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoints.checkpoint import Checkpoint
from ..config import Config
from ..hf.default_workload import default_workload
from ..modules import sources
from ..planning.plan import PlanSummary
from ..planning.planner import Budgets
from ..planning.predict import Prediction
from ..planning.workload import WorkloadSize
from ..runtime.buffers import Buffers
from ..runtime.replanner import Replanner
from ..runtime.request import StreamRequest
from .report import PLAN_KEYS


@dataclass(frozen=True)
class Value:
    """A budget or a setting. `source`: "argument", "variable", "measured", "default", "planner"."""

    value: Any
    source: str


@dataclass(frozen=True)
class Preview:
    """What would be done for a model and a workload. `decode` is the pass for one further token."""

    device: torch.device
    workload: WorkloadSize
    values: dict[str, Value]
    plan: PlanSummary
    prefill: Prediction
    decode: Prediction

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """None if nothing streams and computing is not known."""
        return _per_second(self.workload.sequences * self.workload.tokens, self.prefill)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """The same."""
        return _per_second(self.workload.sequences, self.decode)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        rates = self.prefill.rates
        return {
            "device": str(self.device),
            "workload": {"batch": self.workload.sequences, "tokens": self.workload.tokens},
            "values": {name: asdict(value) for name, value in self.values.items()},
            "plan": {key: getattr(self.plan, key) for key in PLAN_KEYS},
            "rates": {
                "disk": rates.disk.as_dict(),
                "h2d": {**rates.h2d.as_dict(), "copy_overhead_s": rates.copy_overhead_s},
                "compute": _compute_dict(self.prefill),
                "decode_compute": _compute_dict(self.decode),
            },
            "prefill": self.prefill.as_dict() | {"tokens_per_s": self.prefill_tokens_per_second},
            "decode": self.decode.as_dict() | {"tokens_per_s": self.decode_tokens_per_second},
        }


def _per_second(tokens: int, prediction: Prediction) -> float | None:
    return tokens / prediction.seconds if prediction.seconds > 0 else None


def _compute_dict(prediction: Prediction) -> dict[str, Any]:
    rates = prediction.rates
    measured = {} if rates.compute is None else asdict(rates.compute)
    return {**measured, "source": rates.compute_source, "note": rates.compute_note}


def preview_of(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    device_memory: int | str,
    host_memory: int | str,
    units: str | Sequence[str],
    config: Mapping[str, Any],
    workload: WorkloadSize,
) -> Preview:
    """The plan that `stream` would make with these arguments, and the pass that it should give.

    Measures whatever the size of the model, unless settings say not to; nothing is loaded.
    Raises as `stream` does.
    """
    settings = Config.resolve(config)
    sources.check_surplus(module, checkpoint)
    request = StreamRequest(module, checkpoint, device, settings, checker=None)
    planner = Replanner(request, units, workload)
    planner.check_buffers(device_memory)
    if device.type == "cuda" and device_memory == "auto":  # as from_pretrained does
        buffers = Buffers(module, checkpoint, device)
        try:
            planner.try_out(default_workload(module))
        finally:
            buffers.restore()
    budgets = planner.budgets(device_memory, host_memory)
    planned = planner.plan(budgets)
    planner.measure(planned)
    plan = planner.show(planned, budgets)
    prefill = plan.predicted or planner.predict(planned, budgets)
    decode = prefill
    if prefill.compute_seconds is not None:
        planner.expect(WorkloadSize(workload.sequences, 1))
        decode = planner.predict(planned, budgets, gains=False)
    values = _values(budgets, settings, planned.mode, units, plan)
    return Preview(device, workload, values, plan, prefill, decode)


def _values(
    budgets: Budgets,
    config: Config,
    mode: str | Sequence[str],
    units: str | Sequence[str],
    plan: PlanSummary,
) -> dict[str, Value]:
    """Budgets and what was decided within them; other settings if they were given."""

    def source(name: str) -> str:
        return "planner" if config.sources[name] == "default" else config.sources[name]

    values = {
        "device memory": Value(
            plan.device_budget_bytes, "argument" if budgets.explicit_device else "measured"
        ),
        "host memory": Value(
            plan.host_budget_bytes, "argument" if budgets.explicit_host else "measured"
        ),
        "units": Value(
            mode if isinstance(mode, str) else ", ".join(mode),
            "planner" if units == "auto" else "argument",
        ),
        "lookahead_units": Value(plan.lookahead_units, source("lookahead_units")),
        "staging_mb": Value(plan.staging_bytes / (1 << 20), source("staging_mb")),
        "chunk_mb": Value(plan.chunk_bytes / (1 << 20), source("chunk_mb")),
    }
    for name, origin in config.sources.items():
        if name not in values and origin != "default":
            values[name] = Value(getattr(config, name), origin)
    return values

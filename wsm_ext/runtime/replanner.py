"""The plans of one stream: by what the machine gives, and as large as memory can be had."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _engine
from ..hf.default_workload import DefaultWorkload
from ..modules.raw_memory import without_modes
from ..planning.device_memory import DeviceMemory
from ..planning.plan import PlanSummary
from ..planning.planner import (
    NOTHING_HELD,
    Budgets,
    HeldBytes,
    ModulePlan,
    Planner,
    left_by_buffers,
    streams,
)
from ..planning.predict import Prediction, files_of, measuring_matters, predict
from ..planning.rates import Rates, gather
from ..planning.read_method import DEFAULT_READ_METHOD, ReadMethod
from ..planning.workload import WorkloadSize
from ..sizes import format_bytes
from .request import StreamRequest
from .session import Session
from .trial import Workload, activation_bytes

# Of a device budget that could not be had.
_LESS = 0.9
_MOST_TRIES = 12


class Replanner:
    """Plans for the start and for each resize; `before` is what runs until then.

    The machine is measured as soon as that can matter, and once. Raises ValueError
    (CheckpointError) where the checkpoint does not fit the module.
    """

    @without_modes()
    def __init__(
        self, request: StreamRequest, units: str | Sequence[str], workload: Workload | None
    ) -> None:
        self._request = request
        self._activation_bytes: int | None = None
        self._rates: Rates | None = None  # None: nothing was measured
        # What computing is measured at: sizes that the user stated.
        stated = not (
            workload is None or callable(workload) or isinstance(workload, DefaultWorkload)
        )
        self._workload = WorkloadSize.of(workload) if stated else None
        self._planner = Planner(request.module, request.checkpoint, units, request.config)
        self._planner.check()

    @property
    def activation_bytes(self) -> int | None:
        """What a forward takes beside the weights; None: nobody said."""
        return self._activation_bytes

    @property
    def buffer_bytes(self) -> int:
        """What the module's buffers take on the device."""
        return self._planner.buffers.device_bytes

    @property
    def read_method(self) -> ReadMethod:
        """How the disk is read the fastest."""
        return DEFAULT_READ_METHOD if self._rates is None else self._rates.read_method

    def try_out(self, workload: Workload) -> None:
        """Find what a forward takes. The module's buffers must be on the device."""
        request = self._request
        try:
            least = self._planner.plan_least()
            self._activation_bytes = activation_bytes(
                request.module, least, request.device, workload
            )
        except (ValueError, torch.OutOfMemoryError):
            if not isinstance(workload, DefaultWorkload):
                raise

    def budgets(
        self, device_memory: int | str, host_memory: int | str, held: HeldBytes = NOTHING_HELD
    ) -> Budgets:
        return Budgets(
            self._request.device,
            device_memory,
            host_memory,
            self._request.config,
            self._activation_bytes,
            held,
            self._planner.buffers,
        )

    def check_buffers(self, device_memory: int | str) -> None:
        """Raises ValueError where the module's buffers leave nothing of a named budget."""
        if device_memory != "auto":
            left_by_buffers(device_memory, self._planner.buffers)

    @without_modes()
    def plan(
        self,
        budgets: Budgets,
        before: Session | None = None,
        preload: _engine.Preload | None = None,
    ) -> ModulePlan:
        """Raises ValueError where a budget is too small. What is read `preload` ends where the disk
        is measured: that is done alone."""
        request = self._request
        planned = self._plan(budgets, before)
        if self._rates is not None or not measuring_matters(planned.plan, request.config):
            return planned
        if preload is not None:
            preload.stop()
        self.measure(planned)
        return self._plan(budgets, before)

    def measure(self, planned: ModulePlan) -> None:
        """Find what the machine gives, if it is not known yet; `plan` does where it can matter."""
        if self._rates is None:
            request, files = self._request, files_of(planned.source)
            self._rates = gather(
                request.module, files, request.device, request.config, self._workload
            )

    def _plan(self, budgets: Budgets, before: Session | None) -> ModulePlan:
        rates_of = None if self._rates is None else self._rates.for_units
        if before is None:
            return self._planner.plan(budgets, rates_of)
        planned = before.planned if streams(before.planned.plan) else None
        return self._planner.plan(budgets, rates_of, before.kept_cache(), planned)

    def forget(self) -> None:
        """The module's parameters have changed."""
        self._planner.forget()

    def allocate(
        self, planned: ModulePlan, budgets: Budgets, before: Session | None = None
    ) -> tuple[ModulePlan, DeviceMemory]:
        """The plan and memory for it; a smaller one, and smaller `budgets`, where the device has
        less memory than it said. Takes over memory of `before`, which was stopped.

        Raises torch.OutOfMemoryError where there is hardly any.
        """
        device, asked = self._request.device, budgets.device_bytes
        memory = None if before is None else before.memory
        for _ in range(_MOST_TRIES):
            try:
                return planned, DeviceMemory.allocate(planned.plan, planned.source, device, memory)
            except torch.OutOfMemoryError as error:
                budgets.device_bytes = int(budgets.device_bytes * _LESS)
                planned = self._plan(budgets, before)
                planned.warnings.append(
                    f"the device has no {format_bytes(asked)} for weights ({_first_line(error)}):"
                    f" planned again with {format_bytes(budgets.device_bytes)}"
                )
        return planned, DeviceMemory.allocate(planned.plan, planned.source, device)

    def show(self, planned: ModulePlan, budgets: Budgets) -> PlanSummary:
        """The plan as users see it."""
        known = self._rates is not None and streams(planned.plan)
        predicted = self.predict(planned, budgets) if known else None
        plan = PlanSummary(planned.plan, planned.units, planned.source, predicted)
        plan.activation_bytes = self._activation_bytes
        plan.buffer_bytes = self.buffer_bytes
        if plan.device_budget_bytes >= budgets.device_bytes:  # no count of layers is below it
            plan.device_budget_bytes = budgets.device_bytes + budgets.buffers.device_bytes
        plan.warnings[:0] = planned.warnings
        return plan

    def predict(self, planned: ModulePlan, budgets: Budgets, gains: bool = True) -> Prediction:
        """What a pass should take; `gains`: and what more memory would bring. Only once the machine
        was measured."""
        assert self._rates is not None
        return predict(planned, self._planner, budgets, self._rates, gains)

    def expect(self, workload: WorkloadSize) -> None:
        """From now on, predict for forwards of this size."""
        if self._rates is not None:
            self._rates = self._rates.at(self._request.module, self._request.device, workload)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

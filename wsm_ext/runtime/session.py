"""A plan at work: its device memory, its engine, and the forwards of the module that it wraps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from .. import _engine
from ..modules.raw_memory import without_modes
from ..modules.spec import unit_tensors
from ..planning.device_memory import DeviceMemory
from ..planning.planner import HeldBytes, ModulePlan
from ..planning.read_method import ReadMethod, engine_options
from .parameter_swapper import ParameterSwapper
from .request import StreamRequest
from .seam import stream_getter

Progress = Callable[[int, int], None]

# A pass may take many reads: so many limits of one read are waited for another thread's.
_PATIENCE = 20


class Session:
    """Runs from the constructor, which loads what stays, to `stop`. Another one may run after it,
    and take over what this one has loaded.

    Where the constructor fails, the engine is closed and the module is as it was.
    """

    @without_modes()
    def __init__(
        self,
        request: StreamRequest,
        planned: ModulePlan,
        memory: DeviceMemory,
        read_method: ReadMethod,
        progress: Progress | None = None,
        before: Session | None = None,
        preload: _engine.Preload | None = None,
    ) -> None:
        """`before`: what was stopped. `preload`: what is read of the checkpoint meanwhile."""
        self.planned = planned
        self.memory = memory
        self._device = request.device
        self.current_stream = stream_getter(request.device)
        plan, source = planned.plan, planned.source
        images = [] if request.checker is None else request.checker.images_of(source)
        self.engine: _engine.Engine = _engine.Engine(
            plan,
            -1 if request.device.type == "cpu" else request.device.index,
            memory.arena_address(request.device),
            memory.home_memory(request.device),
            source.memory,
            self.current_stream(),
            engine_options(request.config, read_method),
            None if before is None or before.in_ram else before.engine,
            preload,
        )
        # Before torch and the driver are torn down, should nobody stop it.
        self._finalizer = weakref.finalize(self, self.engine.close)
        try:
            self.engine.load_resident(self.current_stream(), self._progress_of(progress))
            if progress is not None:
                progress(plan.device_home_bytes, plan.device_home_bytes)
            self.swapper = ParameterSwapper(
                request.module,
                planned.units,
                source,
                plan,
                self.engine,
                request.device,
                memory,
                _PATIENCE * request.config.read_timeout_s,
                request.checker,
                images,
            )
        except BaseException:
            self.engine.close()
            raise
        memory.loaded = [True] * len(memory.homes)
        if self.in_ram:
            try:
                self._move_from_ram()
            except BaseException:
                try:
                    self.restore_ram_parameters()
                finally:
                    self.stop()
                raise

    @property
    def in_ram(self) -> bool:
        """Whether the weights come from the module itself."""
        return self.planned.source.in_ram

    def memory_held(self) -> HeldBytes:
        return HeldBytes(self.planned.plan.device_bytes, self.engine.memory().host_bytes)

    def kept_cache(self) -> _engine.KeptCache | None:
        """What the host cache holds for who runs next; None where the weights go back to the module
        in between."""
        return None if self.in_ram else self.engine.kept_cache()

    @without_modes()
    def restore_ram_parameters(self) -> None:
        """Put back what the module held in RAM: every tensor that can be, even when one cannot."""
        failed: list[str] = []
        for owned in self.planned.source.ram_parameters.values():
            try:
                owned.put_back(self.swapper.fetch_host)
            except Exception as error:
                failed.append(f"{owned.name}: {error}")
        if failed:
            raise RuntimeError("parameters that could not be put back: " + "; ".join(failed))

    def between_passes(self) -> AbstractContextManager[None]:
        """No other thread is in a pass meanwhile: theirs are waited for.

        Raises TimeoutError if another thread does not leave its pass.
        """
        return self.swapper.seam.between()

    def inside_pass(self) -> bool:
        """Whether the calling thread is in the middle of a pass."""
        return self.swapper.seam.inside

    def stop(self) -> None:
        """Close the engine, and unwrap the module, even if the device fails. Idempotent.

        A forward that another thread is in fails, and is waited for.
        """
        self.engine.close()  # what it loads ahead must not reach memory that is freed now
        try:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # nor may a forward read it
        finally:
            with self.between_passes():
                self.swapper.undo()
            self._finalizer.detach()

    def _progress_of(self, progress: Progress | None) -> Callable[[], None] | None:
        if progress is None:
            return None
        total = self.planned.plan.device_home_bytes
        return lambda: progress(min(self.engine.totals()["h2d_bytes"], total), total)

    def _move_from_ram(self) -> None:
        """Load every unit once, so that what has a home in the host cache is there.

        Each of the module's own tensors is let go as soon as no unit needs it any more.
        """
        plan, units, source = self.planned.plan, self.planned.units, self.planned.source
        current = self.current_stream()
        needed = set(plan.shards_on_disk())
        # Each shard in RAM is one tensor, of the same index.
        last_user = {
            shard: index for index, unit in enumerate(units) for shard in unit_tensors(unit, source)
        }
        let_go: list[list[int]] = [[] for _ in units]
        for shard, index in last_user.items():
            if shard not in needed:
                let_go[index].append(shard)
        for index, shards in enumerate(let_go):
            if plan.streamed_bytes(index):
                self.engine.acquire(index, current)
                self.engine.release(index, current)
            for shard in shards:
                source.ram_parameters[shard].let_go()

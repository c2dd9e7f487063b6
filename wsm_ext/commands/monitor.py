"""Samples a GPU, through NVML, and this process's memory while something runs.

    with Monitor(device) as monitor:
        ...
    monitor.summary()   # {"rss_bytes": {"mean": ..., "peak": ...}, ...}, and monitor.note

A sample is taken on entry, every `interval_s` in a thread, and on exit, so a summary is not empty.
If NVML does not answer, `note` says why and the GPU's figures are absent. A failing sample ends
the GPU's figures, not the run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType

import psutil
import torch

Sample = Mapping[str, float]


class Monitor:
    def __init__(
        self,
        device: torch.device,
        *,
        interval_s: float = 0.1,
        gpu: Callable[[], Sample] | None = None,
    ) -> None:
        self.note: str | None = None
        self._interval_s = interval_s
        self._samples: list[dict[str, float]] = []
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wsm-monitor", daemon=True)
        self._gpu = gpu
        if gpu is None:
            try:
                self._gpu = _nvml(device)
            except _NoNvmlError as error:
                self.note = str(error)

    def __enter__(self) -> Monitor:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and peak of every quantity that was sampled."""
        series: dict[str, list[float]] = {}
        for sample in self._samples:
            for name, value in sample.items():
                series.setdefault(name, []).append(value)
        return {
            name: {"mean": sum(values) / len(values), "peak": max(values)}
            for name, values in series.items()
        }

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        sample = {"rss_bytes": float(self._process.memory_info().rss)}
        if self._gpu is not None:
            try:
                sample.update(self._gpu())
            except Exception as error:  # whatever NVML raises must not end the run that it watches
                self._gpu = None
                self.note = f"the GPU stopped answering: {error}"
        self._samples.append(sample)


class _NoNvmlError(Exception):
    pass


def _nvml(device: torch.device) -> Callable[[], Sample]:
    if device.type != "cuda":
        raise _NoNvmlError(f"no GPU figures: the device is {device.type}")
    try:
        import pynvml
    except ImportError as error:
        raise _NoNvmlError("no GPU figures: the package nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
        # By identity: CUDA_VISIBLE_DEVICES renumbers the devices for torch, not for NVML.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (pynvml.NVMLError, AttributeError) as error:
        raise _NoNvmlError(f"no GPU figures: NVML does not answer ({error})") from error

    readings: dict[str, Callable[[], float]] = {
        "gpu_utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "gpu_memory_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used,
        "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }

    def sample() -> Sample:
        values = {}
        for name, read in readings.items():
            try:
                values[name] = float(read())
            except pynvml.NVMLError_NotSupported:
                continue
        return values

    return sample

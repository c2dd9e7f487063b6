import sys
import threading
import types

import pytest
import torch
from waits import LIMIT_S

from wsm_ext.commands.monitor import Monitor

CPU = torch.device("cpu")


def test_mean_and_peak_of_what_was_sampled():
    readings = iter([{"power_w": 100.0}, {"power_w": 300.0, "sm_clock_mhz": 5.0}])
    with Monitor(CPU, interval_s=3600, gpu=lambda: next(readings)) as monitor:
        pass
    summary = monitor.summary()
    assert summary["power_w"] == {"mean": 200.0, "peak": 300.0}
    assert summary["sm_clock_mhz"] == {"mean": 5.0, "peak": 5.0}
    assert 1e6 < summary["rss_bytes"]["mean"] <= summary["rss_bytes"]["peak"]


def test_it_samples_while_the_work_runs():
    many = threading.Event()
    count = 0

    def gpu():
        nonlocal count
        count += 1
        if count == 5:
            many.set()
        return {"power_w": 1.0}

    with Monitor(CPU, interval_s=0.001, gpu=gpu) as monitor:
        assert many.wait(LIMIT_S)
    assert not monitor._thread.is_alive()


def test_a_gpu_that_stops_answering_ends_its_figures_alone():
    def lost():
        raise RuntimeError("GPU is lost")

    with Monitor(CPU, interval_s=3600, gpu=lost) as monitor:
        pass
    assert monitor.note == "the GPU stopped answering: GPU is lost"
    assert set(monitor.summary()) == {"rss_bytes"}


def test_on_the_cpu_it_says_why_there_are_no_gpu_figures():
    assert Monitor(CPU).note == "no GPU figures: the device is cpu"


class FakeNvml(types.ModuleType):
    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
        pass

    NVML_CLOCK_SM = 1

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle):  # noqa: N802
        return types.SimpleNamespace(gpu=70)

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return types.SimpleNamespace(used=5 << 30)

    def nvmlDeviceGetClockInfo(self, handle, clock):  # noqa: N802
        raise self.NVMLError_NotSupported

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        return 250_000


@pytest.fixture
def cuda(monkeypatch):
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda:0")


def test_nvml_is_asked_for_torch_s_device_and_may_lack_a_figure(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("pynvml"))
    with Monitor(cuda, interval_s=3600) as monitor:
        pass
    peaks = {
        name: value["peak"] for name, value in monitor.summary().items() if name != "rss_bytes"
    }
    assert peaks == {"gpu_utilisation_percent": 70, "gpu_memory_bytes": 5 << 30, "power_w": 250}
    assert monitor.note is None


def test_without_nvml_it_says_so(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in Monitor(cuda).note

    class Silent(FakeNvml):
        def nvmlInit(self):  # noqa: N802
            raise self.NVMLError("driver not loaded")

    monkeypatch.setitem(sys.modules, "pynvml", Silent("pynvml"))
    assert "NVML does not answer (driver not loaded)" in Monitor(cuda).note

"""Peak memory of a process, seen from another one.

with Watcher(device) as watcher:
    ...
    peak = watcher.peak()      # since the last call
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

_INTERVAL_S = 0.02


class Watcher:
    """A process that looks at this one every 20 ms: anonymous RSS, and the GPU's memory by NVML."""

    def __init__(self, device: torch.device) -> None:
        index = (device.index or 0) if device.type == "cuda" else -1
        command = [sys.executable, __file__, str(os.getpid()), str(index)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.peak()  # it has started

    def peak(self) -> dict[str, int]:
        """`host_bytes`, and on a GPU `device_bytes`: the most since the last call."""
        assert self._process.stdin
        assert self._process.stdout
        print("", file=self._process.stdin, flush=True)
        return dict(json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell RssAnon")


def _look(pid: int, gpu: Any) -> dict[str, int]:
    seen = {"host_bytes": _anonymous_bytes(pid)}
    if gpu is not None:
        import pynvml

        seen["device_bytes"] = int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used)
    return seen


def main() -> None:
    pid, index = int(sys.argv[1]), int(sys.argv[2])
    gpu = None
    if index >= 0:
        import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
    peak: dict[str, int] = {}
    while True:
        asked, _, _ = select.select([sys.stdin], [], [], 0)
        now = _look(pid, gpu)
        peak = {key: max(value, peak.get(key, 0)) for key, value in now.items()}
        if asked:
            if not sys.stdin.readline():
                return
            print(json.dumps(peak), flush=True)
            peak = now
        time.sleep(_INTERVAL_S)


if __name__ == "__main__":
    main()

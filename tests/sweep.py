"""Streams a tiny model of every model type of the installed transformers, and compares the bits.

    python tests/sweep.py [--device cuda] [--only llama bert] [--json FILE]

Each type is loaded by both, with nothing at home on the device and every place overwritten when it
is released: each weight, a forward and a short `generate()`, with layers and leaves as units. Types
run in processes of their own workers, with a time limit: a crash or a hang costs one type.

Prints one line a type and the counts, and exits with 1 if anything differs, fails or crashes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

# What happened to a type. The first three say nothing against wsm_ext.
EQUAL = "equal"  # all that was compared has the same bits
LOADED = "weights equal"  # transformers runs it on none of the inputs that were tried
NOT_BUILT = "not built"  # transformers makes no small model of it, or does not load what it saves
REFUSED = "refused"  # by name
DIFFERENT = "different"
FAILED = "failed"
CRASHED = "crashed"  # the process died, or took longer than the limit
BAD = (DIFFERENT, FAILED, CRASHED)

BUDGETS: dict[str, Any] = {
    "device_memory": "2GiB",
    "host_memory": "8MiB",
    "config": {"home_bytes": 0, "poison": True},
}
MODES = ("layer", "leaf")
NEW_TOKENS = 4
MOST_CONFIGS = 4


class NotBuiltError(Exception):
    """transformers makes nothing to compare with."""


# -- one type --------------------------------------------------------------------------------------


def check(model_type: str, device: str) -> dict[str, Any]:
    import sweep_models as models

    cls = models.class_of(model_type)
    if cls is None:
        return {"outcome": NOT_BUILT, "detail": "a part of others, without a class of its own"}
    record: dict[str, Any] = {"class": cls.__name__}
    with tempfile.TemporaryDirectory(prefix="wsm-sweep-") as folder:
        try:
            inputs = _save(cls, Path(folder), record)
            reference = _resident(cls, Path(folder), device)
        except NotBuiltError as error:
            return record | {"outcome": NOT_BUILT, "detail": str(error)}
        given = None if inputs is None else {k: _to(v, device) for k, v in inputs.items()}
        return record | _compare(cls, Path(folder), device, reference, given)


def _save(cls: Any, folder: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """Write a model; the inputs that it takes, or None."""
    import sweep_models as models

    built: Any = None
    problem = "no config that is small enough"
    for count, config in enumerate(models.candidates(cls)):
        if count == MOST_CONFIGS:
            break
        try:
            model = _random(cls, config)
        except Exception as error:
            problem = _said(error)
            continue
        built = built or (model, None)
        inputs = _inputs(model)
        if inputs is not None:
            built = (model, inputs)
            break
    if built is None:
        raise NotBuiltError(problem)
    model, inputs = built
    try:
        model.save_pretrained(folder)
    except Exception as error:
        raise NotBuiltError(f"save_pretrained: {_said(error)}") from error
    record["parameters"] = sum(p.numel() for p in model.parameters())
    record["inputs"] = None if inputs is None else {k: list(v.shape) for k, v in inputs.items()}
    return inputs


def _random(cls: Any, config: Any) -> Any:
    """With other values in each tensor, so that no two can be taken for each other."""
    import torch

    torch.manual_seed(7)
    model = cls(config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn_like(tensor))
    return model


def _inputs(model: Any) -> dict[str, Any] | None:
    import sweep_models as models

    for inputs in models.inputs_for(model):
        try:
            if models.run(model, inputs):
                return inputs
        except Exception:
            continue
    return None


def _resident(cls: Any, folder: Path, device: str) -> Any:
    """What transformers loads, with what decides over the last bit as it is when streamed."""
    try:
        loaded, told = cls.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        raise NotBuiltError(f"from_pretrained: {_said(error)}") from error
    lost = sorted(told["missing_keys"])
    if lost:
        raise NotBuiltError(f"its own checkpoint lacks {', '.join(lost[:3])}")
    model = loaded.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the file's mapping
    return model.requires_grad_(False).to(device)


def _compare(
    cls: Any, folder: Path, device: str, reference: Any, inputs: dict[str, Any] | None
) -> dict[str, Any]:
    import sweep_models as models

    import wsm_ext as wsm

    expected = tokens = None
    if inputs is not None:
        try:
            expected = models.run(reference, inputs)
            if not models.same(models.run(reference, inputs), expected):
                inputs, expected = None, None  # its own bits change from run to run
        except Exception:
            inputs = None  # on this device
    if inputs is not None and reference.can_generate():
        tokens = _generate(reference, inputs)
    record: dict[str, Any] = {"generates": tokens is not None}
    for mode in MODES:
        try:
            streamed = wsm.from_pretrained(
                folder, auto_class=cls, device=device, units=mode, **BUDGETS
            )
        except ValueError as error:
            return record | {"outcome": REFUSED, "detail": f"{mode}: {_said(error)}"}
        try:
            with streamed:
                wrong = _differs(streamed, reference, inputs, expected, tokens)
        except Exception as error:
            return record | {"outcome": FAILED, "detail": f"{mode}: {_said(error)}"}
        if wrong is not None:
            return record | {"outcome": DIFFERENT, "detail": f"{mode}: {wrong}"}
    return record | {"outcome": LOADED if inputs is None else EQUAL}


def _differs(
    streamed: Any, reference: Any, inputs: dict[str, Any] | None, expected: Any, tokens: Any
) -> str | None:
    import sweep_models as models
    import torch

    buffers = dict(streamed.named_buffers())
    for name, buffer in reference.named_buffers():
        if not models.same([buffers[name]], [buffer]):
            return f"buffer {name}"
    if inputs is None:
        for name, parameter in reference.named_parameters():
            if not models.same([streamed.fetch(name)], [parameter]):
                return f"parameter {name}"
        return None
    for number in (1, 2):
        ours = models.run(streamed, inputs)
        if not models.same(ours, expected):
            return f"forward, pass {number}: {models.difference(ours, expected)}"
    if tokens is not None and not torch.equal(_generate(streamed, inputs, may_fail=False), tokens):
        return "generate"
    return None


def _generate(model: Any, inputs: dict[str, Any], may_fail: bool = True) -> Any:
    import sweep_models as models
    import torch

    given = models.copied(inputs)
    given.pop("decoder_input_ids", None)
    sizes = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            made = model.generate(**given, **sizes)
    except Exception:
        if may_fail:  # transformers does not generate from this alone
            return None
        raise
    return made if isinstance(made, torch.Tensor) else None


def _to(value: Any, device: str) -> Any:
    return value.to(device) if hasattr(value, "to") else value


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def work(device: str) -> None:
    """Reads types from stdin, and writes a line of JSON for each."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print is not a result
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    for line in sys.stdin:
        begin = time.perf_counter()
        try:
            record = check(line.strip(), device)
        except Exception as error:
            record = {"outcome": FAILED, "detail": _said(error)}
        seconds = round(time.perf_counter() - begin, 2)
        print(json.dumps(record | {"seconds": seconds}), file=results, flush=True)


# -- all of them -----------------------------------------------------------------------------------


class Worker:
    """A process that checks one type after another; a new one, if it dies or hangs."""

    def __init__(self, device: str, limit_s: float) -> None:
        self._command = [sys.executable, __file__, "--worker", "--device", device]
        self._limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None

    def check(self, model_type: str) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(self._limit_s, process.kill)
        timer.start()
        try:
            process.stdin.write(f"{model_type}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if line:
            result: dict[str, Any] = json.loads(line)
            return result
        code = process.wait()
        self._process = None
        return {"outcome": CRASHED, "detail": f"exit status {code}, limit {self._limit_s:g} s"}

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()


def sweep(types: list[str], device: str, jobs: int, limit_s: float) -> dict[str, dict[str, Any]]:
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for each in types:
        waiting.put(each)
    results: dict[str, dict[str, Any]] = {}

    def run() -> None:
        worker = Worker(device, limit_s)
        while True:
            try:
                each = waiting.get_nowait()
            except queue.Empty:
                worker.close()
                return
            results[each] = record = worker.check(each)
            print(f"{each:40} {record['outcome']:14} {record.get('detail', '')}", flush=True)

    threads = [threading.Thread(target=run) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {each: results[each] for each in types}


def environment(device: str) -> dict[str, Any]:
    import torch
    import transformers

    import wsm_ext as wsm

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu (host device)",
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "wsm_ext": wsm.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="types at a time (2)")
    parser.add_argument("--limit", type=float, default=180, help="seconds for a type (180)")
    parser.add_argument("--only", nargs="*", metavar="TYPE", help="these types alone")
    parser.add_argument("--json", metavar="FILE", help="write all results to FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.device)
        return 0
    import sweep_models as models

    begin = time.perf_counter()
    types = options.only or models.model_types()
    results = sweep(types, options.device, options.jobs, options.limit)
    counts = Counter(record["outcome"] for record in results.values())
    counts["that generate"] = sum(bool(record.get("generates")) for record in results.values())
    seconds = round(time.perf_counter() - begin)
    print(f"{len(types)} types in {seconds} s: {dict(counts.most_common())}")
    if options.json:
        entry = {
            "benchmark": "sweep",
            "environment": environment(options.device),
            "results": {"counts": dict(counts), "seconds": seconds, "types": results},
        }
        Path(options.json).write_text(json.dumps([entry], indent=1) + "\n")
    return int(any(record["outcome"] in BAD for record in results.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Interrupts at random moments, and what they may leave behind: nothing.

    python tests/interrupts.py --count 200000 --seed 1

Each trial runs one piece of work on a streamed model, with a signal (SIGALRM, handled as Ctrl-C is)
at a random moment of it. After each, the next run without one must give the same bits as the
resident model, the seam must be idle, and at the end the model must close. `make interrupts` runs
as many as `docs/reliability.md` promises; tests/test_interrupts.py a few.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import wsm_ext as wsm
from wsm_ext.checkpoints.checkpoint import Checkpoint
from wsm_ext.checkpoints.verify import verify
from wsm_ext.hf.synthetic import make_llama_checkpoint

SHAPE = {"layers": 4, "hidden": 64, "intermediate": 160, "heads": 4, "kv_heads": 2, "vocab": 96}
IDS = torch.arange(1, 9)[None]
BUDGET = {"device": "cpu", "device_memory": "3MiB", "host_memory": "8MiB"}
CONFIG = {"poison": True, "read_timeout_s": 60}


@dataclass
class Work:
    """Something to do with a streamed model, and what it gives when nobody interrupts."""

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], bool]
    close: Callable[[], None]
    idle: Callable[[], bool]


@dataclass
class Outcome:
    trials: int = 0
    interrupted: int = 0
    wrong: Counter[str] = field(default_factory=Counter)


def seam_of(model: Any) -> Any:
    return wsm.handle(model).session.swapper.seam


def forward_work(folder: Path, name: str, **options: Any) -> Work:
    """A model whose parameters are cast when they arrive, or checked against their hashes."""
    model = wsm.from_pretrained(
        folder, dtype=torch.bfloat16, units="layer", config=CONFIG, **BUDGET, **options
    )
    expected = run_forward(model)
    return Work(
        name,
        lambda: run_forward(model),
        lambda found: torch.equal(found, expected),
        model.close,
        lambda: bool(seam_of(model).idle),
    )


def run_forward(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def backward_work(folder: Path) -> Work:
    """Forward and backward through the streamed layers, checkpointed in part."""
    model = wsm.from_pretrained(
        folder, dtype=torch.bfloat16, units="layer", config=CONFIG, **BUDGET
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    hidden = torch.randn(
        1, 8, SHAPE["hidden"], generator=torch.Generator().manual_seed(1)
    ).bfloat16()

    def run() -> torch.Tensor:
        x = hidden.clone().requires_grad_()
        model(inputs_embeds=x).logits.float().square().mean().backward()
        assert x.grad is not None
        return x.grad

    expected = run()
    return Work(
        "backward",
        run,
        lambda found: torch.equal(found, expected),
        model.close,
        lambda: bool(seam_of(model).idle),
    )


def resize_work(folder: Path) -> Work:
    """Forwards between resizes. A resize that was interrupted may have closed the model: then it
    says so, the module is as it was, and it can be streamed again."""
    state: dict[str, Any] = {"model": None, "budgets": 0}

    def open_again() -> Any:
        state["model"] = wsm.from_pretrained(
            folder, dtype=torch.bfloat16, units="layer", config=CONFIG, **BUDGET
        )
        return state["model"]

    open_again()
    expected = run_forward(state["model"])

    def run() -> torch.Tensor:
        model = state["model"]
        if not isinstance(model, wsm.StreamedModule):
            model = open_again()
        state["budgets"] += 1
        model.resize(device_memory=("3MiB", "4MiB")[state["budgets"] % 2])
        return run_forward(model)

    def close() -> None:
        if isinstance(state["model"], wsm.StreamedModule):
            state["model"].close()

    def idle() -> bool:
        model = state["model"]
        return not isinstance(model, wsm.StreamedModule) or bool(seam_of(model).idle)

    return Work("resize", run, lambda found: torch.equal(found, expected), close, idle)


def works(folder: Path) -> dict[str, Callable[[], Work]]:
    return {
        "casts": lambda: forward_work(folder, "casts"),
        "integrity": lambda: forward_work(folder, "integrity", verify=True),
        "backward": lambda: backward_work(folder),
        "resize": lambda: resize_work(folder),
    }


def make_model(folder: Path) -> Path:
    """In float32: a bfloat16 model is cast from it."""
    made = make_llama_checkpoint(folder / "model", shards=1, dtype=torch.float32, **SHAPE)
    verify(Checkpoint.open(made))
    return made


def interrupt(work: Work, count: int, draws: random.Random, outcome: Outcome) -> None:
    """`count` trials of the work, each with a signal at a random moment."""
    armed = False

    def press_ctrl_c(*_: object) -> None:
        nonlocal armed
        if armed:  # once, and only while the work runs
            armed = False
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, press_ctrl_c)
    work.run()
    seconds = float("inf")
    for _ in range(count):
        # Of the quickest run so far: most trials are interrupted, however busy others are.
        before = time.perf_counter()
        complete = work.run()
        seconds = min(seconds, time.perf_counter() - before)
        if not work.check(complete):
            outcome.wrong[f"{work.name}: other bits"] += 1
        outcome.trials += 1
        armed = True
        try:
            signal.setitimer(signal.ITIMER_REAL, draws.uniform(1e-5, seconds))
            work.run()
            armed = False
        except KeyboardInterrupt:
            outcome.interrupted += 1
        torch.set_grad_enabled(True)  # torch's own no_grad() may be left half way
        if not work.idle():
            outcome.wrong[f"{work.name}: not idle"] += 1
    if not work.check(work.run()):
        outcome.wrong[f"{work.name}: other bits"] += 1


def run(folder: Path, count: int, seed: int, names: list[str] | None = None) -> Outcome:
    swallowed: list[Any] = []
    sys.unraisablehook = swallowed.append
    draws, outcome = random.Random(seed), Outcome()
    chosen = works(make_model(folder))
    for name in names or list(chosen):
        work = chosen[name]()
        interrupt(work, count, draws, outcome)
        work.close()
    # Python itself reports what was raised in a finalizer of somebody else's.
    outcome.wrong["swallowed"] += sum("wsm_ext" in repr(each.object) for each in swallowed)
    outcome.wrong += Counter()  # drops zeros
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="trials of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", action="append", choices=["casts", "integrity", "backward", "resize"]
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(Path(folder), options.count, options.seed, options.only)
    print(
        f"{outcome.trials} trials, {outcome.interrupted} interrupted; wrong: {dict(outcome.wrong)}"
    )
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

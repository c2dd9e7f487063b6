"""A new process to its first logits; says "output" and its phases when they are on the host.

Started by the case `first`. Budgets are the defaults.
"""

from __future__ import annotations

import time
from typing import Any

BEGIN = time.perf_counter()


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--vocab", type=int, required=True)
    arguments = parser.parse_args()

    import torch

    laps: list[str] = []

    def timed(owner: Any, name: str) -> None:
        """Says when the call begins and ends."""
        inner = getattr(owner, name)

        def outer(*given: Any, **named: Any) -> Any:
            begin = time.perf_counter() - BEGIN
            try:
                return inner(*given, **named)
            finally:
                laps.append(f"{name} {begin:.2f}-{time.perf_counter() - BEGIN:.2f}")

        setattr(owner, name, outer)

    torch_s = time.perf_counter() - BEGIN
    import wsm_ext as wsm
    from wsm_ext.runtime.handle import StreamHandle
    from wsm_ext.runtime.replanner import Replanner

    wsm_s = time.perf_counter() - BEGIN
    timed(Replanner, "try_out")
    timed(Replanner, "plan")
    timed(StreamHandle, "_start")
    timed(StreamHandle, "__init__")
    model = wsm.from_pretrained(arguments.folder, device=arguments.device)
    loaded_s = time.perf_counter() - BEGIN
    with model, torch.inference_mode():
        shape = (arguments.batch, arguments.tokens)
        ids = torch.randint(0, arguments.vocab, shape).to(arguments.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        finite = bool(logits.isfinite().all())  # waits for the device
        output_s = time.perf_counter() - BEGIN
        if not finite:
            raise SystemExit("the logits are not finite")
        print(
            f"output torch {torch_s:.2f} wsm {wsm_s:.2f} loaded {loaded_s:.2f} "
            f"logits {output_s:.2f} s, streams: {model.plan.streams}; {', '.join(laps)}",
            flush=True,
        )


if __name__ == "__main__":
    main()

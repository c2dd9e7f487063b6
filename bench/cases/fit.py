"""Case 3: a GPU of 16 GiB, against diffusers' leaf-wise offloading in the same run."""

from __future__ import annotations

from typing import Any

import harness
import peers
import torch
from context import Context, describe, open_streamed
from harness import GIB
from passes import counted_passes, gpu_memory, outside_torch, run_ratios, timed_passes
from peer_models import ROOM_BYTES, TOTAL_BYTES

SHAPE = (1, 2048)
PEER = "diffusers leaf"
PEER_LIMIT_S = 180


def sixteen_gib(context: Context) -> dict[str, Any]:
    """Weights, activations and context in 16 GiB: what stays on the device need not cross."""
    context.need_cuda("16 GiB of a GPU's memory")
    context.drop("streamed", "resident", "wrapped", "link")
    source, passes = context.ram_source, context.arguments.passes
    ids = context.ids(*SHAPE)
    budget = TOTAL_BYTES - outside_torch(context.device) - ROOM_BYTES[SHAPE]
    host = source.sizes.model_bytes + source.sizes.model_bytes // 64 + context.arguments.staging
    with open_streamed(context, source, device_memory=budget, host_memory=host) as model:
        timed_passes(model, ids, 2)
        runs = [counted_passes(model, ids, passes) for _ in range(context.arguments.repeats)]
        memory = gpu_memory(context.device) or {}
        # The most that torch ever held, and what is held outside it now.
        peak = torch.cuda.max_memory_reserved(context.device) + outside_torch(context.device)
        described = describe(model, source)
    link = context.link_ceiling()
    link.sample()
    ours = run_ratios(runs, "h2d_bytes", link.median)
    peer = peers.run_peer(
        PEER,
        source.folder,
        device=str(context.device),
        shapes=[SHAPE],
        passes=passes,
        limit_s=PEER_LIMIT_S,
    )
    if "failed" in peer:
        raise RuntimeError(f"{PEER}: {peer['failed']}")
    theirs = peer["runs"]["1x2048"]["seconds_per_pass"]["median"]
    seconds = ours["seconds_per_pass"]["median"]
    rows = [
        ("wsm", f"{seconds:.4f}", f"{peak / GIB:.2f}"),
        (PEER, f"{theirs:.4f}", f"{peer['torch_peak_bytes'] / GIB:.2f}"),
    ]
    harness.print_table("16 GiB in all, 1x2048", ("who", "s/pass", "GPU peak GiB"), rows)
    print(f"  ratio {seconds / theirs:.4f}")
    return {
        "wsm": ours,
        "peer": peer,
        "peak_bytes": peak,
        "gpu_memory": memory,
        **described,
        "figure": seconds / theirs,
        "conditions": {f"{peak / GIB:.2f} GiB were used": peak <= TOTAL_BYTES},
    }

"""Streamed logits against the resident model's on the same device, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import shapes
import torch

MIB = harness.MIB
# One a pass: batch and length change between passes.
SHAPES = ((1, 17), (2, 33), (1, 1), (1, 64), (3, 8))
NEW_TOKENS = 32
STAGING_MB = 2


@dataclass
class Case:
    name: str
    device_memory: int
    host_memory: int
    config: dict[str, Any]
    holds: Callable[[Any], bool]  # whether the plan is what the case is about
    reader: str | None = None
    mode: str | None = None


def cases(sizes: shapes.Sizes) -> Iterator[Case]:
    """Limits in bytes are exact and small, so that the ring wraps and the arena is really tight."""
    model = sizes.model_bytes
    tight = max(2 * sizes.layer_place_bytes, sizes.ends_place_bytes)
    arena = tight + sizes.layer_place_bytes
    staging = STAGING_MB * MIB
    ring = {"chunk_mb": 0.25, "staging_mb": STAGING_MB}
    alone = {**ring, "arena_bytes": arena, "home_bytes": 0}
    disk = {**alone, "cpu_cache_cap_layers": 0}
    room = shapes.blocks(arena)

    def from_disk(plan: Any) -> bool:
        return bool(plan.disk_home_bytes == plan.model_bytes)

    def from_cache(plan: Any) -> bool:
        return bool(plan.host_home_bytes == plan.model_bytes)

    def from_all(plan: Any) -> bool:
        return min(plan.device_home_bytes, plan.host_home_bytes, plan.disk_home_bytes) > 0

    yield Case("all on disk", room, staging, disk, from_disk)
    yield Case("all in the cache", room, shapes.host_bytes(sizes, staging), alone, from_cache)
    mixed = {**ring, "arena_bytes": arena, "home_bytes": model // 4}
    both = room + shapes.blocks(model // 4)
    yield Case("mixture", both, staging + model // 3, mixed, from_all)
    barely = {**disk, "arena_bytes": tight}
    yield Case("arena of two units", room, staging, barely, lambda p: 0 < p.arena_bytes <= tight)
    for reader, direct, mode in (
        ("uring", "on", "direct"),
        ("pread", "on", "direct"),
        ("pread", "off", "buffered"),
    ):
        config = {**disk, "reader": reader, "direct": direct}
        yield Case(f"{reader}, {mode}", room, staging, config, from_disk, reader, mode)


@torch.inference_mode()
def outputs(model: Any, device: torch.device, vocab: int) -> list[torch.Tensor]:
    """Logits of one pass for each shape, then the tokens of a generation."""
    generator = torch.Generator().manual_seed(7)
    out = []
    for shape in SHAPES:
        ids = torch.randint(0, vocab, shape, generator=generator).to(device)
        out.append(model(input_ids=ids, use_cache=False).logits.cpu())
    ids = torch.randint(0, vocab, (2, 9), generator=generator).to(device)
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    mask = torch.ones_like(ids)
    tokens = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
    assert tokens.shape[1] == ids.shape[1] + NEW_TOKENS
    out.append(tokens.cpu())
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bits, not values: NaNs of one pattern are the same, zeros of two signs are not."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_case(
    case: Case, folder: Path, device: torch.device, vocab: int, wanted: list[torch.Tensor]
) -> dict[str, Any]:
    import wsm_ext as wsm

    model = wsm.from_pretrained(
        folder,
        device=device,
        device_memory=case.device_memory,
        host_memory=case.host_memory,
        units="layer",
        config=case.config,
    )
    with model:
        got = outputs(model, device, vocab)
        stats, plan = model.stats(), model.plan
        equal = [same(a, b) for a, b in zip(wanted, got, strict=True)]
        readers = {(r["reader"], r["mode"]) for r in stats["readers"].values()}
        asked = (case.reader, case.mode)
        as_planned = case.holds(plan) and (case.reader is None or readers == {asked})
        return {
            "equal": equal,
            "as_planned": as_planned,
            "ok": all(equal) and as_planned,
            "readers": sorted(readers),
            "homes": [plan.device_home_bytes, plan.host_home_bytes, plan.disk_home_bytes],
            "arena_bytes": plan.arena_bytes,
            "passes": stats["passes"],
        }


def run(folder: Path, device: torch.device, vocab: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    import wsm_ext as wsm

    resident: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    resident.requires_grad_(False)  # as the streamed base is: else torch multiplies another way
    wanted = outputs(resident, device, vocab)
    del resident
    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(folder))
    results: dict[str, Any] = {}
    rows = []
    for case in cases(sizes):
        try:
            results[case.name] = check_case(case, folder, device, vocab, wanted)
            one = results[case.name]
            verdict = "bit-equal" if all(one["equal"]) else f"DIFFER {one['equal']}"
            if not one["as_planned"]:
                verdict += f", NOT AS PLANNED: homes {one['homes']}, readers {one['readers']}"
        except Exception as error:  # a case that cannot run must not hide the others
            results[case.name] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            verdict = results[case.name]["error"]
        rows.append((case.name, verdict))
    passes = f"{len(SHAPES)} passes, {NEW_TOKENS} tokens generated"
    harness.print_table(f"streamed against resident ({passes})", ("case", "result"), rows)
    return {"cases": results, "ok": all(one["ok"] for one in results.values())}

"""The same forwards by other projects that stream weights, and by wsm: one table.

    python bench/peers.py --folder /dev/shm/llama-12 --disk-folder DISK/peers --json peers.json
    python bench/peers.py --peers "wsm arena,two buffers" --device cpu --preset tiny --folder TMP/x

Each runs in a process of its own, under a time limit; one that fails, or is not installed, says why
and does not stop the others. Each is set up as its documentation advises for speed. GB/s are the
bytes of the layers over the time of a forward, from before the first to a synchronize after the
last of --passes back to back, three times; those that take seconds run once, and those that read a
disk in every pass run the first shape alone.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import harness
import shapes
import torch
from harness import GB, GIB
from passes import gpu_memory, outside_torch, reset_peak, timed_passes
from shapes import parse_shapes

STAGING_BYTES = GIB
SLOW_S = 1.5
TOTAL_BYTES = 16 * GIB
# Activations of 8x2048 tokens and the allocator's rounding are beside the weights in the 16 GiB.
ROOM_BYTES = {(1, 1): GIB // 2, (1, 2048): 5 * GIB // 4}
ROOM_DEFAULT = 5 * GIB


@dataclass
class Job:
    folder: Path
    scratch: Path  # on a disk, for those that write a copy of their own
    device: torch.device
    shapes: list[tuple[int, int]]

    def plain(self) -> Any:
        """The model in RAM."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()


# -- each returns what is called -----------------------------------------------------------------


def resident(job: Job) -> Any:
    return job.plain().to(job.device)


def two_buffers(job: Job) -> Any:
    from by_hand import TwoBuffers

    model = job.plain()
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList()
    model.to(job.device)
    model.model.layers = layers
    model._two_buffers = TwoBuffers(layers, job.device)
    return model


def wsm_arena(job: Job) -> Any:
    import wsm_ext as wsm

    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(job.folder))
    arena = 2 * sizes.layer_place_bytes
    return wsm.from_pretrained(
        job.folder,
        device=job.device,
        device_memory=shapes.blocks(arena),
        host_memory=shapes.host_bytes(sizes, STAGING_BYTES),
        config={"arena_bytes": arena, "home_bytes": 0},
    )


def wsm_16gib(job: Job) -> Any:
    import wsm_ext as wsm

    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(job.folder))
    room = max(ROOM_BYTES.get(shape, ROOM_DEFAULT) for shape in job.shapes)
    return wsm.from_pretrained(
        job.folder,
        device=job.device,
        device_memory=TOTAL_BYTES - outside_torch(job.device) - room,
        host_memory=shapes.host_bytes(sizes, STAGING_BYTES),
    )


def accelerate_cpu(job: Job) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(job.plain(), execution_device=job.device)


def accelerate_disk(job: Job) -> Any:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(job.folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    layers = {f"model.layers.{i}": "disk" for i in range(config.num_hidden_layers)}
    ends = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return load_checkpoint_and_dispatch(
        model,
        str(job.folder),
        device_map={**layers, **dict.fromkeys(ends, "cpu" if job.device.type == "cpu" else 0)},
        offload_folder=str(job.scratch),
        dtype=torch.bfloat16,
    )


def diffusers(kind: str, to_disk: bool = False) -> Callable[[Job], Any]:
    def make(job: Job) -> Any:
        from diffusers.hooks import apply_group_offloading

        model = job.plain()
        for end in (model.lm_head, model.model.norm, model.model.rotary_emb):
            end.to(job.device)
        settings: dict[str, Any] = {"offload_type": kind, "non_blocking": True}
        if kind == "block_level":
            settings["num_blocks_per_group"] = 1
        if to_disk:
            settings["offload_to_disk_path"] = str(job.scratch)
        if job.device.type == "cuda":
            settings |= {"use_stream": True, "record_stream": True}
        apply_group_offloading(model.model, onload_device=job.device, **settings)
        return model

    return make


def deepspeed_zero3(job: Job) -> Any:
    import deepspeed
    from transformers import AutoConfig
    from transformers.integrations import HfDeepSpeedConfig

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    config = AutoConfig.from_pretrained(job.folder)
    layer = 4 * config.hidden_size * (config.hidden_size + config.intermediate_size)  # at most
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": True},
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 2 * layer,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": config.hidden_size,
        },
    }
    deepspeed.init_distributed("nccl" if job.device.type == "cuda" else "gloo")
    keep = HfDeepSpeedConfig(settings)  # alive while the model is loaded: from_pretrained looks
    engine = deepspeed.initialize(model=job.plain(), config_params=settings)[0]
    engine.module.eval()
    engine.module._ds_config = keep
    return engine.module


def mmgp(job: Job) -> Any:
    model = job.plain()
    from mmgp import offload  # after the model: it patches safe_open

    model._offload = offload.all(
        {"transformer": model},
        pinnedMemory=True,
        asyncTransfers=True,
        budgets={"*": 6000},
        quantizeTransformer=False,
    )
    return model


def airllm(job: Job) -> Any:
    from airllm import AutoModel, airllm_base

    # The checkpoint is random and has no tokenizer.
    airllm_base.AirLLMBaseModel.get_tokenizer = lambda self, hf_token=None: None
    return AutoModel.from_pretrained(
        str(job.folder),
        device=str(job.device),
        dtype=torch.bfloat16,
        layer_shards_saving_path=str(job.scratch),
    )


@dataclass(frozen=True)
class Peer:
    make: Callable[[Job], Any]
    package: str | None = None
    disk: bool = False  # reads the disk in every pass
    only_cuda: bool = True


PEERS = {
    "resident": Peer(resident, only_cuda=False),
    "wsm arena": Peer(wsm_arena, "wsm_ext", only_cuda=False),
    "wsm 16 GiB": Peer(wsm_16gib, "wsm_ext"),
    "two buffers": Peer(two_buffers, "torch", only_cuda=False),
    "diffusers leaf": Peer(diffusers("leaf_level"), "diffusers"),
    "diffusers block": Peer(diffusers("block_level"), "diffusers"),
    "deepspeed zero3": Peer(deepspeed_zero3, "deepspeed"),
    "mmgp": Peer(mmgp, "mmgp"),
    "accelerate cpu": Peer(accelerate_cpu, "accelerate", only_cuda=False),
    "accelerate disk": Peer(accelerate_disk, "accelerate", disk=True, only_cuda=False),
    "diffusers disk": Peer(diffusers("leaf_level", to_disk=True), "diffusers", disk=True),
    "airllm": Peer(airllm, "airllm", disk=True),
}


def measure(name: str, job: Job, passes: int) -> dict[str, Any]:
    """In the child: load, warm up, run; the layers' GB/s by shape."""
    import wsm_ext as wsm

    peer = PEERS[name]
    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(job.folder))
    vocab = json.loads((job.folder / "config.json").read_text())["vocab_size"]
    reset_peak(job.device)
    begin = time.perf_counter()
    model = peer.make(job)
    load_s = time.perf_counter() - begin
    runs: dict[str, Any] = {}
    for batch, tokens in job.shapes[:1] if peer.disk else job.shapes:
        ids = torch.randint(0, vocab, (batch, tokens), device=job.device)
        warm = timed_passes(model, ids, 1)
        # Slow ones run less often: a pass of seconds says enough.
        repeats = 1 if warm > SLOW_S else 3
        count = 1 if warm > SLOW_S else passes
        if repeats > 1:
            timed_passes(model, ids, 1)  # some learn their order in the first
        seconds = [timed_passes(model, ids, count) / count for _ in range(repeats)]
        runs[f"{batch}x{tokens}"] = {
            "seconds_per_pass": harness.summary(seconds),
            "layers_GB_per_s": sizes.layers_bytes / harness.summary(seconds)["median"] / GB,
        }
    out: dict[str, Any] = {"runs": runs, "load_s": load_s, **(gpu_memory(job.device) or {})}
    if peer.package and peer.package != "wsm_ext":
        out["version"] = metadata.version(peer.package)
    return out


def run_peer(
    name: str,
    folder: Path,
    *,
    device: str,
    shapes: list[tuple[int, int]],
    passes: int,
    limit_s: float,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """A peer's figures, from a process of its own; {"failed": why} where there are none."""
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        out = Path(own, "figures.json")
        command = [sys.executable, str(Path(__file__).resolve()), "--child", name]
        command += ["--folder", str(folder), "--disk-folder", own, "--device", device]
        command += ["--shapes", ",".join(f"{b}x{t}" for b, t in shapes)]
        command += ["--passes", str(passes), "--json", str(out)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {limit_s:g} s"}
        if not out.is_file():
            lines = ran.stderr.strip().splitlines() or [f"status {ran.returncode}"]
            return {"failed": lines[-1], "stderr": lines[-20:]}
        figures: dict[str, Any] = json.loads(out.read_text())
        return figures


def child(arguments: argparse.Namespace) -> int:
    job = Job(
        arguments.folder, arguments.disk_folder, torch.device(arguments.device), arguments.shapes
    )
    try:
        figures = measure(arguments.child, job, arguments.passes)
        status = 0
    except ImportError as error:
        figures, status = {"failed": f"not installed: {error}"}, 1
    except Exception as error:  # whatever another project raises
        traceback.print_exc()
        figures = {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        status = 1
    arguments.json.write_text(json.dumps(figures))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # some leave threads behind that never end


def table(results: dict[str, dict[str, Any]], names: list[str]) -> None:
    rows = []
    for peer, figures in results.items():
        if "failed" in figures:
            rows.append((peer, figures["failed"][:80]))
            continue
        cells = []
        for name in names:
            run = figures["runs"].get(name)
            median = run and run["seconds_per_pass"]["median"]
            cells.append(f"{median:.4f} s ({run['layers_GB_per_s']:.1f})" if run else "")
        peak = figures.get("torch_peak_bytes")
        memory = f"{peak / GIB:.1f} GiB" if peak else ""
        rows.append((peer, *cells, memory, f"{figures['load_s']:.1f} s"))
    header = ("who", *(f"{name} (GB/s of layers)" for name in names), "GPU peak", "load")
    width = len(header)
    filled = [(*row, *[""] * (width - len(row))) for row in rows]
    harness.print_table("the same forwards", header, filled)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peers", default=",".join(PEERS), help="comma-separated")
    add("--folder", type=Path, required=True, help="where the checkpoint is, or is written")
    add("--disk-folder", type=Path, help="on a disk, for peers that write a copy of their own")
    add("--preset", default="70b")
    add("--layers", type=int, default=12)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--shapes", type=parse_shapes, default="1x1,1x2048,8x2048")
    add("--passes", type=int, default=5)
    add("--limit-s", type=float, default=150, help="for each peer")
    add("--json", type=Path)
    add("--plot", type=Path, help="draw the table here (SVG; needs matplotlib)")
    add("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.peers.split(",") if name not in PEERS]
    if unknown:
        parser.error(f"unknown peer {', '.join(unknown)}; known: {', '.join(PEERS)}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.child:
        return child(arguments)
    device = torch.device(arguments.device)
    shapes.ensure_checkpoint(arguments.folder, arguments.preset, arguments.layers)
    if arguments.disk_folder:
        arguments.disk_folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.peers.split(","):
        if PEERS[name].only_cuda and device.type != "cuda":
            results[name] = {"failed": "needs a GPU"}
            continue
        begin = time.perf_counter()
        results[name] = run_peer(
            name,
            arguments.folder,
            device=arguments.device,
            shapes=arguments.shapes,
            passes=arguments.passes,
            limit_s=arguments.limit_s,
            scratch=arguments.disk_folder,
        )
        said = results[name].get("failed", "done")
        print(f"{name}: {said} in {time.perf_counter() - begin:.1f} s", flush=True)
        record = harness.result("peers", "forwards", device, results)
        record["checkpoint"] = {"preset": arguments.preset, "layers": arguments.layers}
        if arguments.json:
            harness.write_results(arguments.json, [record])
    table(results, [f"{b}x{t}" for b, t in arguments.shapes])
    if arguments.plot:
        import chart

        chart.draw_peers(record, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The same forwards by other projects that stream weights, and by wsm: one table.

    python bench/peers.py --folder /dev/shm/llama-12 --disk-folder DISK/peers --json peers.json
    python bench/peers.py --peers "wsm arena,two buffers" --device cpu --preset tiny --folder TMP/x

Each runs in a process of its own, under --limit-s, and all of them under --total-s; one that fails,
or is not installed, says why and does not stop the others. Each is set up as its documentation
advises for speed. GB/s are the bytes of the layers over the time of a forward, from before the
first to a synchronize after the last of --passes back to back, three times; those that take seconds
run once. Those that read a disk in every pass run the first shape alone, forward by forward, and
what they read is dropped from the page cache before each; one that reads past the page cache and
begins with the next pass before it is asked runs back to back. The last logits are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import coldness
import harness
import shapes
import torch
from harness import GB, GIB, MIB
from passes import gpu_memory, outside_torch, reset_peak, timed_passes
from shapes import parse_shapes

STAGING_BYTES = GIB
SLOW_S = 1.5
LEAST_S = 20  # with less time left a peer is not begun
LOGITS = 16  # of the vocabulary's, spread over it
SAME = 0.05  # of the largest of them: other kernels round otherwise in bfloat16
TAIL_LINES, TAIL_SHOWN = 60, 25
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

    def cool(self) -> None:
        """Drops what every pass reads from the page cache."""
        try:
            coldness.make_cold(self._read())
        except coldness.NotColdError as error:
            print(f"not cold: {error}")

    def cached_bytes(self) -> int:
        """Of what every pass reads, what lies in the page cache."""
        return sum(map(coldness.cached_pages, self._read())) * mmap.PAGESIZE

    def _read(self) -> list[Path]:
        """A peer's own copy, else the checkpoint."""
        own = [path for path in self.scratch.rglob("*") if path.is_file()]
        copied = sum(path.stat().st_size for path in own) > MIB
        return own if copied else sorted(self.folder.glob("*.safetensors"))


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
    """What two buffers hold: places for two layers, and all that is no layer."""
    import wsm_ext as wsm

    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(job.folder))
    arena, homes = 2 * sizes.layer_place_bytes, sizes.ends_place_bytes
    return wsm.from_pretrained(
        job.folder,
        device=job.device,
        device_memory=shapes.blocks(arena) + shapes.blocks(homes),
        host_memory=shapes.host_bytes(sizes, STAGING_BYTES),
        config={"arena_bytes": arena, "home_bytes": homes},
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


def wsm_disk(job: Job) -> Any:
    """The same on the device; of RAM the staging ring alone."""
    import wsm_ext as wsm

    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(job.folder))
    arena, homes = 2 * sizes.layer_place_bytes, sizes.ends_place_bytes
    return wsm.from_pretrained(
        job.folder,
        device=job.device,
        device_memory=shapes.blocks(arena) + shapes.blocks(homes),
        host_memory=STAGING_BYTES,
        config={"arena_bytes": arena, "home_bytes": homes, "cpu_cache_cap_layers": 0}
        | {"staging_mb": STAGING_BYTES // MIB},
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
    for library in ("NCCL", "GLOO"):  # one rank needs no network, and there may be none
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
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
        perc_reserved_mem_max=0.9,  # half by default, of what a virtual machine has grown to so far
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
    ahead: bool = False  # past the page cache; and a pass begins before it is asked for
    only_cuda: bool = True


# What matters most comes first: --total-s may cut the last.
PEERS = {
    "wsm 16 GiB": Peer(wsm_16gib, "wsm_ext"),
    "wsm arena": Peer(wsm_arena, "wsm_ext", only_cuda=False),
    "two buffers": Peer(two_buffers, "torch", only_cuda=False),
    "diffusers leaf": Peer(diffusers("leaf_level"), "diffusers"),
    "diffusers block": Peer(diffusers("block_level"), "diffusers"),
    "resident": Peer(resident, only_cuda=False),
    "mmgp": Peer(mmgp, "mmgp"),
    "accelerate cpu": Peer(accelerate_cpu, "accelerate", only_cuda=False),
    "deepspeed zero3": Peer(deepspeed_zero3, "deepspeed"),
    "wsm disk": Peer(wsm_disk, "wsm_ext", disk=True, ahead=True, only_cuda=False),
    "accelerate disk": Peer(accelerate_disk, "accelerate", disk=True, only_cuda=False),
    "diffusers disk": Peer(diffusers("leaf_level", to_disk=True), "diffusers", disk=True),
    "airllm": Peer(airllm, "airllm", disk=True),
}


class Kept:
    """A model whose last output is kept."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.output: Any = None

    def __call__(self, **words: Any) -> Any:
        self.output = self.model(**words)
        return self.output

    def logits(self) -> list[float]:
        """A few of the last token's."""
        last = self.output.logits[0, -1].float().cpu()
        few: list[float] = last[:: max(1, last.numel() // LOGITS)][:LOGITS].tolist()
        return few


def measure_shape(
    peer: Peer, job: Job, model: Any, ids: torch.Tensor, passes: int
) -> dict[str, Any]:
    """Seconds of a pass, after a first; and what the last one gave."""
    kept = Kept(model)
    timed_passes(kept, ids, 1)
    out: dict[str, Any] = {}
    if peer.disk:
        seconds, cached = [], []
        for _ in range(2):
            job.cool()
            cached.append(job.cached_bytes())
            if peer.ahead:  # what it fetched in the meantime must not be had for nothing
                timed_passes(kept, ids, 1)
                seconds.append(timed_passes(kept, ids, passes) / passes)
                cached.append(job.cached_bytes())
            else:
                seconds.append(timed_passes(kept, ids, 1))
        out["cached_bytes"] = max(cached)
    else:
        seconds = [timed_passes(kept, ids, 1)]  # some learn their order in the first
        if seconds[0] < SLOW_S:
            seconds = [timed_passes(kept, ids, passes) / passes for _ in range(3)]
    return {"seconds_per_pass": harness.summary(seconds), **out, "logits": kept.logits()}


def measure(
    name: str, job: Job, passes: int, keep: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """In the child: load, warm up, run; the layers' GB/s by shape. `keep` gets it as it grows."""
    import wsm_ext as wsm

    peer = PEERS[name]
    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(job.folder))
    vocab = json.loads((job.folder / "config.json").read_text())["vocab_size"]
    reset_peak(job.device)
    begin = time.perf_counter()
    model = peer.make(job)
    out: dict[str, Any] = {"runs": {}, "load_s": time.perf_counter() - begin}
    if peer.package and peer.package != "wsm_ext":
        out["version"] = metadata.version(peer.package)
    for batch, tokens in job.shapes[:1] if peer.disk else job.shapes:
        torch.manual_seed(0)  # the same for all
        ids = torch.randint(0, vocab, (batch, tokens), device=job.device)
        run = measure_shape(peer, job, model, ids, passes)
        run["layers_GB_per_s"] = sizes.layers_bytes / run["seconds_per_pass"]["median"] / GB
        out["runs"][f"{batch}x{tokens}"] = run
        out |= gpu_memory(job.device) or {}
        if keep:
            keep(out)
    if job.device.type == "cuda" and not peer.disk:
        # The link moves from minute to minute: what it gave to bare copies just after the runs.
        link = harness.LinkCeiling(job.device, total_bytes=GIB // 2)
        link.sample(5)
        out["link_GB_per_s"] = link.median
    return out


def no_paths(text: str) -> str:
    """Absolute paths by their last name: results are published."""
    return re.sub(r"(?<![\w./])/(?!/)(?:[\w.+-]+/)+", "…/", text)


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
    """A peer's figures, from a process of its own; {"failed": why} where there are none.

    One that is stopped by the limit keeps the shapes it has done; "cut" says so.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        out, log, copy = (Path(own, name) for name in ("figures.json", "log.txt", "copy"))
        copy.mkdir()
        command = [sys.executable, str(Path(__file__).resolve()), "--child", name]
        command += ["--folder", str(folder), "--disk-folder", str(copy), "--device", device]
        command += ["--shapes", ",".join(f"{b}x{t}" for b, t in shapes)]
        command += ["--passes", str(passes), "--json", str(out), "--limit-s", str(limit_s)]
        late = ""
        # Into a file, and with all that it starts: a pipe would be waited for.
        with log.open("w") as said:
            running = subprocess.Popen(
                command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                running.wait(limit_s)
            except subprocess.TimeoutExpired:
                late = f"not done after {limit_s:g} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL)
                running.wait()
        lines = no_paths(log.read_text(errors="replace")).strip().splitlines()[-TAIL_LINES:]
        figures: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    died = next(iter(lines[-1:]), "") or f"status {running.returncode}"
    why = late or no_paths(figures.pop("failed", "")) or (died if running.returncode else "")
    if figures.get("runs"):
        return {**figures, "cut": why, "said": lines} if why else figures
    return {"failed": why or died, "said": lines}


def child(arguments: argparse.Namespace) -> int:
    job = Job(
        arguments.folder, arguments.disk_folder, torch.device(arguments.device), arguments.shapes
    )
    faulthandler.dump_traceback_later(0.8 * arguments.limit_s)  # where it hangs, if it does
    figures: dict[str, Any] = {}

    def keep(so_far: dict[str, Any]) -> None:
        figures.update(so_far)
        partial = arguments.json.with_suffix(".part")
        partial.write_text(json.dumps(figures))
        partial.replace(arguments.json)

    status = 0
    try:
        measure(arguments.child, job, arguments.passes, keep)
    except Exception as error:  # whatever another project raises
        traceback.print_exc()
        missing = isinstance(error, ImportError)
        why = f"not installed: {error}" if missing else f"{type(error).__name__}: {error}"
        keep({"failed": why})
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # some leave threads behind that never end


def farthest(differences: Iterable[float]) -> float:
    """The largest: infinity where one is not finite, which `max` may pass over."""
    return max(each if math.isfinite(each) else math.inf for each in differences)


def compare_logits(results: dict[str, dict[str, Any]], names: list[str]) -> None:
    """Notes in each run how far its logits are from the resident model's, else the first peer's."""
    for name in names:
        runs = {
            who: peer["runs"][name] for who, peer in results.items() if name in peer.get("runs", ())
        }
        if not runs:
            continue
        wanted = runs.get("resident", next(iter(runs.values())))["logits"]
        largest = max(map(abs, wanted)) or 1.0
        for run in runs.values():
            pairs = zip(wanted, run["logits"], strict=True)
            run["logits_off"] = farthest(abs(a - b) / largest for a, b in pairs)


def table(results: dict[str, dict[str, Any]], names: list[str]) -> None:
    rows, notes = [], []
    for peer, figures in results.items():
        if "runs" not in figures:
            why = figures.get("skipped") or figures["failed"]
            notes.append(f"{peer}: {why[:160]}")
            continue
        if "cut" in figures:
            notes.append(f"{peer}: {figures['cut']}; what it had done by then stands above")
        cells: list[str] = []
        for name in names:
            run = figures["runs"].get(name)
            median = run and run["seconds_per_pass"]["median"]
            cells += (f"{median:.4f}", f"{run['layers_GB_per_s']:.1f}") if run else ("", "")
        off = farthest(run["logits_off"] for run in figures["runs"].values())
        cached = max(run.get("cached_bytes", 0) for run in figures["runs"].values())
        if cached:
            notes.append(
                f"{peer}: {cached / MIB:.0f} MiB of what it reads stayed in the page cache"
            )
        link = figures.get("link_GB_per_s")
        peak = figures.get("torch_peak_bytes")
        memory = f"{peak / GIB:.1f} GiB" if peak else ""
        same = "same" if off <= SAME else f"off by {off:.2g}"
        rows.append(
            (
                peer,
                *cells,
                f"{link:.1f}" if link else "",
                memory,
                f"{figures['load_s']:.1f} s",
                same,
            )
        )
    columns = [column for name in names for column in (f"{name} s", "GB/s")]
    header = ("who", *columns, "link", "GPU peak", "load", "logits")
    harness.print_table("the same forwards: seconds, GB/s of layers", header, rows)
    for note in notes:
        print(f"  {note}")


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
    add("--passes", type=int, default=3)
    add("--limit-s", type=float, default=100, help="for each peer")
    add("--total-s", type=float, default=420, help="for all, writing the checkpoint included")
    add("--json", type=Path)
    add("--plot", type=Path, help="draw the table here (SVG; needs matplotlib)")
    add("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.peers.split(",") if name not in PEERS]
    if unknown:
        parser.error(f"unknown peer {', '.join(unknown)}; known: {', '.join(PEERS)}")
    return arguments


class Record:
    """What there is so far, in --json. The machine is described once, when a peer has run: to ask
    the GPU may take memory of it, and the first peer is to find it empty."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        self.results: dict[str, dict[str, Any]] = {}
        self.shapes = [f"{b}x{t}" for b, t in arguments.shapes]
        self.whole: dict[str, Any] = {}

    def write(self) -> None:
        compare_logits(self.results, self.shapes)
        if not self.whole:
            self.whole = harness.result("peers", "forwards", self.device, self.results)
            made = {"preset": self.arguments.preset, "layers": self.arguments.layers}
            self.whole["checkpoint"] = made
            self.whole["environment"]["transformers"] = metadata.version("transformers")
        if self.arguments.json:
            harness.write_results(self.arguments.json, [self.whole])


def main() -> int:
    arguments = parse_arguments()
    if arguments.child:
        return child(arguments)
    device = torch.device(arguments.device)
    end = time.perf_counter() + arguments.total_s
    shapes.ensure_checkpoint(arguments.folder, arguments.preset, arguments.layers)
    if arguments.disk_folder:
        arguments.disk_folder.mkdir(parents=True, exist_ok=True)
    record = Record(arguments, device)
    results = record.results
    for name in arguments.peers.split(","):
        if PEERS[name].only_cuda and device.type != "cuda":
            results[name] = {"skipped": "needs a GPU"}
            continue
        begin = time.perf_counter()
        left = end - begin
        if left < LEAST_S:
            results[name] = {"skipped": f"not begun: the {arguments.total_s:g} s for all are over"}
            continue
        results[name] = run_peer(
            name,
            arguments.folder,
            device=arguments.device,
            shapes=arguments.shapes,
            passes=arguments.passes,
            limit_s=min(arguments.limit_s, left),
            scratch=arguments.disk_folder,
        )
        peer = results[name]
        said = peer.get("failed") or peer.get("cut") or "done"
        print(f"{name}: {said} in {time.perf_counter() - begin:.1f} s", flush=True)
        if "said" in peer:
            print("\n".join(f"    | {line}" for line in peer["said"][-TAIL_SHOWN:]), flush=True)
        record.write()
    record.write()
    table(results, record.shapes)
    if arguments.plot and any("runs" in peer for peer in results.values()):
        import chart

        chart.draw_peers(record.whole, arguments.plot)
    ours = [name for name, peer in results.items() if name.startswith("wsm") and "failed" in peer]
    return 1 if ours else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the peer that runs ends, too
    sys.exit(main())

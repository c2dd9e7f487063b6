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
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import harness
import shapes
import torch
from harness import GB, GIB, MIB
from passes import gpu_memory, reset_peak, timed_passes
from peer_models import PEERS, Job, Peer
from shapes import parse_shapes

SLOW_S = 1.5
LEAST_S = 20  # with less time left a peer is not begun
LOGITS = 16  # of the vocabulary's, spread over it
SAME = 0.05  # of the largest of them: other kernels round otherwise in bfloat16
TAIL_LINES, TAIL_SHOWN = 60, 25


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

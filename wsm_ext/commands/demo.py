"""`wsm demo`: a small Llama that does not fit its budgets, streamed, and compared bit for bit with
the resident one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..hf.synthetic import PRESETS, make_llama_checkpoint
from ..runtime.request import resolve_device
from ..sizes import format_bytes
from . import report
from .options import Commands, device_options


@dataclass(frozen=True)
class Size:
    shape: dict[str, Any]
    layers: int
    shards: int
    tokens: int
    device_memory: str
    host_memory: str
    new_tokens: int = 32


SIZES = {
    "small": Size(
        PRESETS["demo"], layers=12, shards=5, tokens=64, device_memory="96MiB", host_memory="64MiB"
    ),
    "tiny": Size(
        {"hidden": 128, "intermediate": 352, "heads": 4, "kv_heads": 2, "vocab": 256},
        layers=12,
        shards=3,
        tokens=8,
        device_memory="2MiB",
        host_memory="1MiB",
    ),
}


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        parents=[device_options()],
        help="stream a small synthetic model and check its bits",
        description="Make a small Llama, stream it under budgets far smaller than it, and compare "
        "logits and tokens bit for bit with the resident model. The exit status is 1 if they "
        "differ.",
    )
    parser.add_argument("--keep", metavar="FOLDER", help="make the checkpoint there, and keep it")
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    device = resolve_device(options.device)
    content = run_demo(Console(), device=device, keep=options.keep, size=SIZES[options.size])
    content["command"] = options.command_line
    if options.json:
        report.write_json(options.json, content)
    return 0 if content["bit_equal"] else 1


@dataclass
class _Outcome:
    """What both models must agree on, to the bit."""

    prefill_logits: torch.Tensor
    tokens: torch.Tensor
    step_logits: torch.Tensor
    seconds: float

    def differences(self, other: _Outcome) -> list[str]:
        pairs = {
            "prefill logits": (self.prefill_logits, other.prefill_logits),
            "generated tokens": (self.tokens, other.tokens),
            "logits of the generation": (self.step_logits, other.step_logits),
        }
        return [name for name, (ours, theirs) in pairs.items() if not _same_bits(ours, theirs)]


def run_demo(
    console: Console,
    *,
    device: torch.device,
    keep: str | os.PathLike[str] | None = None,
    size: Size = SIZES["small"],
) -> dict[str, Any]:
    """Run it, print the report, and return it; `bit_equal` says whether the models agree."""
    with _folder(keep) as folder:
        make_llama_checkpoint(folder, layers=size.layers, shards=size.shards, **size.shape)
        nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        console.print(
            f"a Llama of {size.layers} layers, {format_bytes(nbytes)} in {size.shards} shards, "
            f"with {size.device_memory} of device memory and {size.host_memory} of pinned memory "
            f"on {device}",
            highlight=False,
        )
        streamed, prefills, content = _stream(console, folder, device, size)
        resident = _resident(folder, device, size)
    different = streamed.differences(resident)
    content |= {
        "checkpoint_bytes": nbytes,
        "prefill": prefills.as_dict(),
        "generate_s": {"streamed": streamed.seconds, "resident": resident.seconds},
        "bit_equal": not different,
        "different": different,
    }
    _print_comparison(console, size, streamed, resident)
    if different:
        console.print(
            f"[bold red]different bits[/] from the resident model: {', '.join(different)}"
        )
    else:
        console.print("[bold green]bit-equal[/] with the resident model: logits and tokens")
    return content


@contextmanager
def _folder(keep: str | os.PathLike[str] | None) -> Iterator[Path]:
    if keep is not None:
        folder = Path(keep)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; --keep takes a new folder")
        yield folder
        return
    # /tmp is memory on many machines; /var/tmp is a disk by convention.
    base = "/var/tmp" if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="wsm-demo-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stream(
    console: Console, folder: Path, device: torch.device, size: Size
) -> tuple[_Outcome, report.Prefills, dict[str, Any]]:
    from ..pretrained import from_pretrained

    begin = time.perf_counter()
    with from_pretrained(
        folder, device=device, device_memory=size.device_memory, host_memory=size.host_memory
    ) as model:
        load_seconds = time.perf_counter() - begin
        report.print_plan(console, model)
        vocab = size.shape["vocab"]
        prefills = report.run_prefills(
            model, device=device, vocab=vocab, batch=1, tokens=size.tokens, repeat=3
        )
        report.print_prefills(console, prefills, load_seconds=load_seconds)
        outcome = _run(model, device, size)
        return outcome, prefills, report.document(["wsm", "demo"], device, model)


def _resident(folder: Path, device: torch.device, size: Size) -> _Outcome:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    finally:
        if bars_shown:
            logging.enable_progress_bar()
    # As the streamed base is: torch multiplies by a weight that requires grad with other kernels
    # (at::matmul folds a batch then), whose sums round differently.
    return _run(model.requires_grad_(False).to(device), device, size)


@torch.inference_mode()
def _run(model: Any, device: torch.device, size: Size) -> _Outcome:
    generator = torch.Generator().manual_seed(1)
    shape = (1, size.tokens)
    ids = torch.randint(0, size.shape["vocab"], shape, generator=generator, device="cpu").to(device)
    logits = model(input_ids=ids, use_cache=False).logits
    report.synchronize(device)
    begin = time.perf_counter()
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=size.new_tokens,
        min_new_tokens=size.new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    report.synchronize(device)
    seconds = time.perf_counter() - begin
    step_logits = torch.stack(generated.logits)
    return _Outcome(logits.cpu(), generated.sequences.cpu(), step_logits.cpu(), seconds)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def _print_comparison(console: Console, size: Size, streamed: _Outcome, resident: _Outcome) -> None:
    table = Table(title=f"generation of {size.new_tokens} tokens", title_justify="left")
    table.add_column("model")
    table.add_column("seconds", justify="right")
    table.add_column("tokens/s", justify="right")
    for name, outcome in (("streamed", streamed), ("resident", resident)):
        rate = size.new_tokens / outcome.seconds
        table.add_row(name, f"{outcome.seconds:.2f}", f"{rate:.1f}")
    console.print(table)

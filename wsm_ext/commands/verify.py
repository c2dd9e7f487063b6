"""`wsm verify`: hashes a model's tensors, and later compares them with the hashes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import TimeRemainingColumn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.verify import Verified, verify
from ..sizes import format_bytes
from ..wording import first_of
from . import report
from .loading import folder_of, progress_bar
from .options import Commands, output_options

_MOST_SHOWN = 20
_GONE = "the checkpoint has no such tensor any more"


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "verify",
        parents=[output_options()],
        help="hash a model's tensors, and compare them with the hashes later",
        description="Read every tensor of a checkpoint once and hash it. The first time, the "
        "hashes are written to a file beside the model. After that they are compared with it: the "
        "exit status is 1 if a tensor differs, is missing, is new, or has another dtype or shape. "
        "`--verify` of the other commands checks by that file what they load.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a model's folder, a safetensors file, or an id on the hub"
    )
    parser.add_argument(
        "--sidecar", type=Path, metavar="FILE", help="the file of hashes, if not beside MODEL"
    )
    parser.add_argument(
        "--update", action="store_true", help="write the hashes anew, of MODEL as it is now"
    )
    parser.add_argument("--revision", metavar="REV", help="the hub revision")
    parser.add_argument("--local-files-only", action="store_true", help="ask the hub's cache only")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    path = Path(options.model).expanduser()
    if options.revision is not None or not path.exists():
        path = folder_of(options)
    with progress_bar("hashing", TimeRemainingColumn()) as progress:
        checkpoint = Checkpoint.open(path)
        result = verify(checkpoint, options.sidecar, update=options.update, progress=progress)
    print_verified(Console(), result)
    if options.json:
        content = report.setting(options.command_line, torch.device("cpu"))
        report.write_json(
            options.json, {**content, "model": options.model, "verify": result.as_dict()}
        )
    return 0 if result.equal else 1


def print_verified(console: Console, result: Verified) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    read = f"{result.tensors} tensors, {format_bytes(result.bytes)} read"
    if result.seconds > 0:
        read += f" in {result.seconds:.1f} s ({result.bytes / result.seconds / 1e9:.2f} GB/s)"
    if result.wrote:
        say(f"wrote the hashes of {read}: {result.sidecar}")
        return
    kinds: dict[str, Sequence[str]] = {
        "DIFFERS": result.differ,
        "CHANGED": result.changed,
        "MISSING": result.missing,
        "NEW": result.new,
    }
    for kind, names in kinds.items():
        lines = [f"{name!r}: {result.details.get(name, _GONE)}" for name in names]
        if lines:
            prefix, more = f"{kind:8} ", len(lines) > _MOST_SHOWN
            listed = first_of(lines, _MOST_SHOWN, f"\n{prefix}")
            say(prefix + listed + (" (--json lists all)" if more else ""))
    if result.equal:
        say(f"equal: {read}, as {result.sidecar} has them")
        return
    say(f"not equal to {result.sidecar}: {read}")
    say(
        "If the checkpoint was changed on purpose, --update records it as it is. If not, download"
        " it again"
    )

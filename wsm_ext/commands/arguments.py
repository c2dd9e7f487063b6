"""What `wsm` can be asked: its commands and their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .._engine import __version__
from .demo import SIZES

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """Of a whole command line; the command's name becomes `command`."""
    parser = argparse.ArgumentParser(
        prog="wsm",
        description="Run models that do not fit in memory: "
        "weights are streamed from the disk while computing.",
    )
    parser.add_argument("--version", action="version", version=f"wsm {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    for add in (_plan, _prefill, _generate, _bench, _verify, _demo):
        add(commands)
    return parser


def _plan(commands: _Commands) -> None:
    commands.add_parser(
        "plan",
        parents=[_streaming(), _workload(), _common()],
        help="show where the weights would live and how long a pass should take",
        description="Plan for a model without loading it: where its bytes would live, what each "
        "link would take, which one limits, and what more memory would bring. Disk, link and one "
        "layer are measured, or taken from a measurement of the last 30 days.",
    )


def _prefill(commands: _Commands) -> None:
    parser = commands.add_parser(
        "prefill",
        parents=[_streaming(), _workload(), _traced(), _common()],
        help="time prefills of random tokens",
        description="Stream a model and time prefills of random tokens: rates, stalls, memory.",
    )
    parser.add_argument("--repeat", type=_count, default=3, metavar="N", help="prefills to run (3)")


def _generate(commands: _Commands) -> None:
    parser = commands.add_parser(
        "generate",
        parents=[_streaming(), _traced(), _common()],
        help="continue a text",
        description="Stream a model and continue a text; the model's folder must have a tokenizer.",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "--max-new-tokens", type=_count, default=64, metavar="N", help="stop after N tokens (64)"
    )


def _bench(commands: _Commands) -> None:
    parser = commands.add_parser(
        "bench",
        parents=[_streaming(), _common()],
        help="measure this machine's links, and how close passes come to them",
        description="Measure the link to the device and the disk under the model's files, then "
        "passes of the streamed model: by the budgets given, from RAM, and from a cold disk. Says "
        "which link limits each, and how close it comes.",
    )
    parser.add_argument("--batch", type=_count, default=1, metavar="B", help="sequences (1)")
    parser.add_argument("--tokens", type=_count, default=128, metavar="T", help="of each (128)")
    parser.add_argument("--passes", type=_count, default=3, metavar="N", help="of each run (3)")


def _verify(commands: _Commands) -> None:
    parser = commands.add_parser(
        "verify",
        parents=[_outputs()],
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
        "--sidecar", type=Path, metavar="FILE", help="the file of hashes, where not beside MODEL"
    )
    parser.add_argument(
        "--update", action="store_true", help="write the hashes anew, of MODEL as it is now"
    )
    parser.add_argument("--revision", metavar="REV", help="the hub revision")
    parser.add_argument("--local-files-only", action="store_true", help="ask the hub's cache only")


def _demo(commands: _Commands) -> None:
    parser = commands.add_parser(
        "demo",
        parents=[_common()],
        help="stream a small synthetic model and check its bits",
        description="Make a small Llama, stream it under budgets far smaller than it, and compare "
        "logits and tokens bit for bit with the resident model. The exit status is 1 if they "
        "differ.",
    )
    parser.add_argument("--keep", metavar="FOLDER", help="make the checkpoint there, and keep it")
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help=argparse.SUPPRESS)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _common() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[_outputs()])
    parser.add_argument(
        "--device", metavar="DEVICE", help="cuda, cuda:1 or cpu (a GPU where there is one)"
    )
    return parser


def _outputs() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _workload() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--batch", type=_count, default=1, metavar="B", help="sequences (1)")
    parser.add_argument(
        "--tokens", type=_count, default=2048, metavar="T", help="tokens of each (2048)"
    )
    return parser


def _traced() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write a timeline to FILE, for ui.perfetto.dev: of the last prefill, or of all of a "
        "generation",
    )
    return parser


def _streaming() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("model", metavar="MODEL", help="a model's folder, or its id on the hub")
    parser.add_argument(
        "--device-memory",
        default="auto",
        metavar="SIZE",
        help='weights on the device, as "12GiB" (auto)',
    )
    parser.add_argument(
        "--host-memory",
        default="auto",
        metavar="SIZE",
        help='pinned host memory, as "48GiB" (auto)',
    )
    parser.add_argument(
        "--units",
        default="auto",
        metavar="UNITS",
        help="auto, layer, group, leaf, or module names with commas between",
    )
    parser.add_argument(
        "--lookahead", type=int, metavar="N", help="units kept in flight ahead of the running one"
    )
    parser.add_argument("--reader", choices=("auto", "uring", "pread"), help="how files are read")
    parser.add_argument("--direct", choices=("auto", "on", "off"), help="read past the page cache")
    parser.add_argument(
        "--dtype", default="auto", help="what to compute in; tensors of another dtype are cast"
    )
    parser.add_argument("--revision", metavar="REV", help="the hub revision")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check each unit by the hashes of `wsm verify` as it is loaded",
    )
    parser.add_argument(
        "--no-measure", action="store_true", help="plan by rules, without measuring anything"
    )
    parser.add_argument("--local-files-only", action="store_true", help="ask the hub's cache only")
    return parser

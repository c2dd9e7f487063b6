"""What several commands of `wsm` are asked for: parts of their parsers, and what these mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeAlias

from ..runtime.trace import check_target

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def count(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def device_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[output_options()])
    parser.add_argument(
        "--device", metavar="DEVICE", help="cuda, cuda:1 or cpu (a GPU if there is one)"
    )
    return parser


def output_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def workload_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--batch", type=count, default=1, metavar="B", help="sequences (1)")
    parser.add_argument(
        "--tokens", type=count, default=2048, metavar="T", help="tokens of each (2048)"
    )
    return parser


def trace_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write a timeline to FILE, for ui.perfetto.dev: of the last prefill, or of all of a "
        "generation",
    )
    return parser


def streaming_options() -> argparse.ArgumentParser:
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


# What the parsed options mean


def units_of(options: argparse.Namespace) -> Any:
    """As `stream` takes them."""
    named = options.units not in ("auto", "layer", "group", "leaf")
    return options.units.split(",") if named else options.units


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    settings = {
        "lookahead_units": options.lookahead,
        "reader": options.reader,
        "direct": options.direct,
        "measure": False if options.no_measure else None,
        "verify": True if options.verify else None,
    }
    return {key: value for key, value in settings.items() if value is not None}


def check_trace(options: argparse.Namespace) -> None:
    """Before a model is loaded for minutes: raises if the timeline cannot be written."""
    if options.trace is not None:
        check_target(Path(options.trace))

"""The command `wsm`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import _engine
from . import bench, demo, generate, plan, prefill, verify

_COMMANDS = (plan, prefill, generate, bench, verify, demo)
_BAD_INPUT = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 is success, 1 bits that differ (demo, verify), 2 an error, 130 an
    interruption. Without a command: the help."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(words)
    if options.command is None:
        parser.print_help()
        return 0
    options.command_line = ["wsm", *words]
    try:
        status: int = options.run(options)
        return status
    except KeyboardInterrupt:
        print("wsm: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        print(f"wsm: error: {_one_line(error)} (--debug shows where)", file=sys.stderr)
        return _BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wsm",
        description="Run models that do not fit in memory: "
        "weights are streamed from the disk while computing.",
    )
    parser.add_argument("--version", action="version", version=f"wsm {_engine.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # Only of these does the text alone say enough; a KeyError's is a bare name.
    clear = isinstance(error, (ValueError, OSError, _engine.EngineError)) and text
    return text if clear else f"{type(error).__name__}: {text}"

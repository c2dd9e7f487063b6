"""The command `wsm`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import actions, arguments

_ACTIONS = {
    "plan": actions.plan,
    "prefill": actions.prefill,
    "generate": actions.generate,
    "bench": actions.bench,
    "verify": actions.verify,
    "demo": actions.demo,
}
_BAD_INPUT = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 is success, 1 bits that differ (demo, verify), 2 an error, 130 an
    interruption."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = arguments.parser().parse_args(given)
    options.command_line = ["wsm", *given]
    try:
        return _ACTIONS[options.command](options)
    except KeyboardInterrupt:
        print("wsm: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        print(f"wsm: error: {_one_line(error)} (--debug shows where)", file=sys.stderr)
        return _BAD_INPUT


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # Only of these does the text alone say enough; a KeyError's is a bare name.
    clear = isinstance(error, (ValueError, OSError)) and text
    return text if clear else f"{type(error).__name__}: {text}"

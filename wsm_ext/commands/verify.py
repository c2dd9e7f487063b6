"""What `wsm verify` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ..checkpoints.verify import Verified
from ..sizes import format_bytes

_MOST_SHOWN = 20


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
        for name in names[:_MOST_SHOWN]:
            detail = result.details.get(name, "the checkpoint has no such tensor any more")
            say(f"{kind:8} {name!r}: {detail}")
        if len(names) > _MOST_SHOWN:
            say(f"{kind:8} and {len(names) - _MOST_SHOWN} more (--json lists all)")
    if result.equal:
        say(f"equal: {read}, as {result.sidecar} has them")
        return
    say(f"not equal to {result.sidecar}: {read}")
    say(
        "If the checkpoint was changed on purpose, --update records it as it is. If not, download"
        " it again"
    )

"""Undoing that does not stop half way."""

from __future__ import annotations

import logging
from collections.abc import Callable

_log = logging.getLogger("wsm_ext")


def do_all(*steps: Callable[[], object]) -> None:
    """Do each step, whatever the ones before it raised; then raise what failed first.

    The other failures are logged.
    """
    first: BaseException | None = None
    for step in steps:
        try:
            step()
        except BaseException as error:
            if first is None:
                first = error
            else:
                _log.warning("while %s was on its way: %s", type(first).__name__, error)
    if first is not None:
        raise first

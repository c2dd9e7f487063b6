"""How files are read: what settings and measurements make of the engine's options."""

from __future__ import annotations

from dataclasses import dataclass

from .. import _engine
from ..config import Config
from ..sizes import format_bytes


@dataclass(frozen=True)
class ReadMethod:
    """How direct reads are made: by which reader ("auto": as suits the machine), and in blocks of
    how many bytes (0: as suits the reader)."""

    reader: str = "auto"
    block_bytes: int = 0

    def __str__(self) -> str:
        reader = "io_uring" if self.reader == "uring" else self.reader
        return f"{reader}, blocks of {format_bytes(self.block_bytes)}"


DEFAULT_READ_METHOD = ReadMethod()


def engine_options(
    config: Config, method: ReadMethod = DEFAULT_READ_METHOD
) -> _engine.EngineOptions:
    """The settings that the engine itself takes. `method`: what was measured to be the fastest."""
    options = _engine.EngineOptions()
    options.reader = getattr(_engine.ReaderChoice, config.reader)
    options.preferred = getattr(_engine.ReaderChoice, method.reader)
    options.block_bytes = method.block_bytes
    options.direct = getattr(_engine.DirectMode, config.direct)
    options.read_threads = config.read_threads or 0
    options.read_timeout_s = config.read_timeout_s
    options.poison = config.poison
    options.verbose = config.verbose
    return options

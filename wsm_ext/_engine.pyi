"""The C++ engine. Sizes are in bytes; streams and addresses are integers."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

__version__: str
built_with_cuda: bool
built_with_uring: bool

class EngineError(RuntimeError): ...

class Limits:
    device_bytes: int
    host_bytes: int
    arena_bytes: int | None
    home_bytes: int | None
    staging_bytes: int | None
    cache_bytes: int | None
    chunk_bytes: int | None
    lookahead_units: int | None
    read_ahead_bytes: int | None
    kept_cache: KeptCache

class KeptCache: ...

class Rates:
    disk_bytes_per_s: float
    h2d_bytes_per_s: float
    copy_overhead_s: float
    compute_s: list[float]
    host_computes: bool

class Simulated:
    pass_seconds: float
    first_pass_seconds: float
    disk_seconds: float
    h2d_seconds: float
    compute_seconds: float
    disk_bytes: int
    h2d_bytes: int
    limit: str
    stall_seconds: dict[str, float]

class Plan:
    arena_bytes: int
    homes_bytes: int
    cache_bytes: int
    staging_bytes: int
    chunk_bytes: int
    slot_count: int
    chunk_count: int
    lookahead_units: int
    read_ahead_bytes: int
    device_budget_bytes: int
    host_budget_bytes: int
    model_bytes: int
    device_home_bytes: int
    host_home_bytes: int
    disk_home_bytes: int
    warnings: list[str]
    def streamed_bytes(self, unit: int) -> int: ...
    def place(self, unit: int) -> tuple[int, int]: ...
    home_blocks: list[tuple[int, list[int]]]
    device_bytes: int
    def tensor_places(self, unit: int) -> list[tuple[int | None, int, int]]: ...
    def shards_on_disk(self) -> set[int]: ...

class ReaderChoice(Enum):
    auto = ...
    uring = ...
    pread = ...

class DirectMode(Enum):
    auto = ...
    off = ...
    on = ...

class EngineOptions:
    reader: ReaderChoice
    preferred: ReaderChoice
    block_bytes: int
    direct: DirectMode
    read_threads: int
    read_timeout_s: float
    poison: bool
    verbose: bool

class Device: ...

def open_device(cuda_index: int) -> Device: ...

class Preload:
    held_bytes: int
    def __init__(self, paths: Sequence[str], options: EngineOptions, most_bytes: int) -> None: ...
    def stop(self) -> None: ...
    def give_up(self) -> None: ...

class TraceRecord:
    kind: str
    unit: int | None
    begin_ns: int
    end_ns: int
    bytes: int
    shard: int
    offset: int
    read_bytes: int
    way: str
    cached: bool
    failed: bool
    cause: str

class Timeline:
    records: list[TraceRecord]
    dropped: int
    full_ns: int
    length_ns: int
    clock_error_ns: int

class Engine:
    closed: bool
    passes: int
    warnings: list[str]
    def __init__(
        self,
        planned: Plan,
        cuda_index: int,
        arena: int,
        homes: Sequence[tuple[int, bool]],
        memory: Sequence[int],
        stream: int,
        options: EngineOptions,
        before: Engine | None = None,
        ahead: Preload | None = None,
    ) -> None: ...
    def load_resident(self, stream: int, progress: Callable[[], None] | None = None) -> None: ...
    def begin_pass(self, stream: int) -> None: ...
    def end_pass(self, stream: int) -> None: ...
    def acquire(self, unit: int, stream: int) -> bool: ...
    def release(self, unit: int, stream: int) -> None: ...
    def discard(self, unit: int) -> None: ...
    def fetch(self, unit: int, tensor: int, target: int) -> None: ...
    def close(self) -> None: ...
    def kept_cache(self) -> KeptCache: ...
    def totals(self) -> dict[str, Any]: ...
    def last_pass(self) -> dict[str, Any]: ...
    def steady_passes(self) -> dict[str, Any]: ...
    def start_trace(self, stream: int, most_records: int) -> None: ...
    def stop_trace(self) -> Timeline: ...
    def memory(self) -> tuple[int, int, int]: ...
    def readers(self) -> dict[str, dict[str, Any]]: ...

def plan_model(
    shards: Sequence[tuple[str, int, int, bool]],
    tensors: Sequence[tuple[str, int, list[tuple[int, int, int, int]], int]],
    units: Sequence[tuple[str, str, list[int], bool]],
    limits: Limits,
    rates: Rates | None = None,
) -> Plan: ...
def expected_pass_seconds(planned: Plan, rates: Rates) -> float: ...
def simulate(
    planned: Plan, rates: Rates, order: Sequence[int] = (), policy: str = "fixed"
) -> Simulated: ...
def device_block_bytes(bytes: int) -> int: ...
def direct_alignment(path: str) -> int: ...
def lies_in_memory(path: str) -> bool: ...
def in_page_cache(fd: int, offset: int, bytes: int) -> bool: ...
def read_range(path: str, offset: int, bytes: int) -> bytes: ...
def time_copies(
    cuda_index: int, target: int, target_bytes: int, source_bytes: int, sizes: Sequence[int]
) -> list[float]: ...
def time_reads(
    paths: Sequence[str],
    spans: Sequence[tuple[int, int, int]],
    ways: Sequence[EngineOptions],
    seconds: float,
    rounds: int = 1,
    most_seconds: float = 3600.0,
    chunk_bytes: int = ...,
) -> list[list[float]]: ...
def usual_chunk_bytes(in_memory: bool) -> int: ...

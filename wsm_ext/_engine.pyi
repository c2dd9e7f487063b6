"""The C++ engine. Sizes are in bytes; streams and addresses are integers."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

__version__: str
built_with_cuda: bool
built_with_uring: bool

class EngineError(RuntimeError): ...

class PlanLimits:
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
    bottleneck: str
    stall_seconds: dict[str, float]

class ShardSpec:
    """A safetensors file, or a tensor that lies in RAM: then `path` is the parameter's name.

    `alignment`: what direct reads of it need. `in_memory`: RAM, or a file of tmpfs.
    """

    def __init__(
        self, path: str, nbytes: int, alignment: int = 1, in_memory: bool = False
    ) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def alignment(self) -> int: ...
    @property
    def in_memory(self) -> bool: ...

class Extent:
    """Bytes of a shard, and where they lie in the tensor."""

    def __init__(self, shard: int, offset: int, nbytes: int, tensor_offset: int = 0) -> None: ...
    @property
    def shard(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def tensor_offset(self) -> int: ...

class TensorSpec:
    """A tensor image: `extents` bring its `nbytes`, each once.

    `parameter_bytes`: the size of the parameter that is made of them on arrival; 0 if they are it.
    """

    def __init__(
        self, name: str, nbytes: int, extents: Sequence[Extent], parameter_bytes: int = 0
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def extents(self) -> list[Extent]: ...
    @property
    def parameter_bytes(self) -> int: ...

class UnitSpec:
    """`tensors`: indices into those of the model. `label`: its name in log lines."""

    def __init__(
        self, name: str, label: str, tensors: Sequence[int], encloses_units: bool = False
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def tensors(self) -> list[int]: ...
    @property
    def encloses_units(self) -> bool: ...

class ModelSpec:
    """What a plan is made for. `units`: in the order of use that is assumed at first."""

    def __init__(
        self, shards: Sequence[ShardSpec], tensors: Sequence[TensorSpec], units: Sequence[UnitSpec]
    ) -> None: ...
    @property
    def shards(self) -> list[ShardSpec]: ...
    @property
    def tensors(self) -> list[TensorSpec]: ...
    @property
    def units(self) -> list[UnitSpec]: ...

class Place:
    """A unit's range in the arena."""

    offset: int
    nbytes: int

class TensorLocation:
    """Where a unit finds a tensor: in a home block, or in the arena (`block` is None), where its
    image lands at `image_offset`."""

    block: int | None
    offset: int
    image_offset: int

class HomeBlock:
    """A piece of device memory for tensors that stay, in their order."""

    nbytes: int
    tensors: list[int]

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
    def place(self, unit: int) -> Place: ...
    home_blocks: list[HomeBlock]
    device_bytes: int
    def tensor_locations(self, unit: int) -> list[TensorLocation]: ...
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
    def drop(self) -> None: ...

class TraceRecord:
    kind: str
    unit: int | None
    begin_ns: int
    end_ns: int
    bytes: int
    shard: int
    offset: int
    read_bytes: int
    route: str
    cached: bool
    failed: bool
    cause: str

class Timeline:
    records: list[TraceRecord]
    dropped: int
    full_ns: int
    length_ns: int
    clock_error_ns: int

class HomeMemory:
    """Where a home block lies, and whether its bytes are there already."""

    def __init__(self, address: int, loaded: bool) -> None: ...

class MemoryUse:
    """Host cache, staging ring and what was read ahead, as mapped; of these, page-locked; and the
    most that it ever was."""

    host_bytes: int
    host_pinned_bytes: int
    host_peak_bytes: int

class Engine:
    closed: bool
    passes: int
    warnings: list[str]
    def __init__(
        self,
        planned: Plan,
        cuda_index: int,
        arena: int,
        homes: Sequence[HomeMemory],
        memory: Sequence[int],
        stream: int,
        options: EngineOptions,
        before: Engine | None = None,
        preload: Preload | None = None,
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
    def memory(self) -> MemoryUse: ...
    def readers(self) -> dict[str, dict[str, Any]]: ...

def plan_model(model: ModelSpec, limits: PlanLimits, rates: Rates | None = None) -> Plan: ...
def expected_pass_seconds(planned: Plan, rates: Rates) -> float: ...
def simulate(planned: Plan, rates: Rates, order: Sequence[int] = ()) -> Simulated: ...
def device_block_bytes(bytes: int) -> int: ...
def direct_alignment(path: str) -> int: ...
def lies_in_memory(path: str) -> bool: ...
def in_page_cache(fd: int, offset: int, bytes: int) -> bool: ...
def read_extent(path: str, offset: int, bytes: int) -> bytes: ...
def time_copies(
    cuda_index: int, target: int, target_bytes: int, source_bytes: int, sizes: Sequence[int]
) -> list[float]: ...

class FileExtent:
    """Bytes of a file, an index into the paths."""

    def __init__(self, file: int, offset: int, nbytes: int) -> None: ...
    @property
    def file(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

def time_reads(
    paths: Sequence[str],
    extents: Sequence[FileExtent],
    methods: Sequence[EngineOptions],
    seconds: float,
    rounds: int = 1,
    most_seconds: float = 3600.0,
    chunk_bytes: int = ...,
) -> list[list[float]]: ...
def usual_chunk_bytes(in_memory: bool) -> int: ...

class Replacements:
    def put(self, target: dict[str, Any], key: str, value: Any) -> None: ...
    def undo(self) -> None: ...
    def __len__(self) -> int: ...

class ParameterSwap:
    """An entry: the dict that holds it, its key, what is there while its unit is acquired, the view
    of the arena that this points to, and what is there at all other times."""

    def __init__(
        self, parameters: dict[str, Any], key: str, placed: Any, view: Any, absent: Any
    ) -> None: ...

class TorchCalls:
    set_version: Any
    versions_in_lists: bool
    current_task: Callable[[], int]
    is_grad_enabled: Callable[[], bool]
    equal: Callable[[Any, Any], bool]
    functorch_level: Callable[[], int | None]
    queue_callback: Any
    raw_stream: Callable[[int], int] | None
    device_index: int

class Scope:
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: Any) -> None: ...

class LendScope:
    def __enter__(self) -> bool: ...
    def __exit__(self, *exception: Any) -> None: ...

class Seam:
    inside: bool
    idle: bool
    depth: int
    dissolved: bool
    backward_under_way: bool
    active: list[int]
    def __init__(
        self,
        engine: Engine | None,
        torch: TorchCalls,
        turn_limit_s: float,
        check_frozen: Callable[[], None],
    ) -> None: ...
    def add_unit(
        self,
        index: int,
        name: str,
        place: Place,
        swaps: Sequence[ParameterSwap],
        memory: Any,
        arrive: Callable[[bool], None] | None,
    ) -> None: ...
    def unit(self, index: int) -> Scope: ...
    def pass_scope(self) -> Scope: ...
    def lend(self, unit: int) -> LendScope: ...
    def between(self) -> Scope: ...
    def hook_of(self, chain: Sequence[int]) -> Callable[..., None]: ...
    def dissolve(self) -> None: ...

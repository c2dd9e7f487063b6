"""Weight streaming for PyTorch: models larger than the GPU's memory, or than RAM.

import wsm_ext as wsm
model = wsm.from_pretrained("Llama-3.1-70B/", device_memory="12GiB", host_memory="48GiB")
model.generate(...)
"""

from __future__ import annotations

from ._engine import EngineError, __version__
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.image import CheckpointError, Extent, TensorImage, assemble
from .config import Config
from .pretrained import from_pretrained
from .runtime.integrity import IntegrityError
from .runtime.streamed_class import StreamedModule, handle
from .stream import stream

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Config",
    "EngineError",
    "Extent",
    "IntegrityError",
    "StreamedModule",
    "TensorImage",
    "__version__",
    "assemble",
    "from_pretrained",
    "handle",
    "stream",
]

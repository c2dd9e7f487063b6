"""Where a model's folder is: here, in the hub's cache, or on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..checkpoints.files import GGUF_ADVICE, is_gguf
from ..checkpoints.image import CheckpointError

_DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_NOT_DOWNLOADED = ["original/*", "consolidated*"]


def resolve_folder(
    path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """A local folder as it is; anything else is asked from the hub's cache, then from the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} means nothing for the local folder {folder}"
            )
        return folder
    if folder.is_file() and is_gguf(folder):
        raise CheckpointError(f"{folder} is a GGUF file{GGUF_ADVICE}")
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a file: give the model's folder, which has its config.json too"
        )
    name = os.fspath(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise CheckpointError(f"{name}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=_DOWNLOADED,
                ignore_patterns=_NOT_DOWNLOADED,
            )
        )
    except Exception as error:  # the hub client has no common base class for what can go wrong
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{name}: no such folder here, and the hub did not supply it: {reason[0]}"
        ) from error

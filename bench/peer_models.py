"""How each project that streams weights is set up, as its documentation advises for speed."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coldness
import shapes
import torch
from harness import GIB, MIB
from passes import outside_torch

STAGING_BYTES = GIB
TOTAL_BYTES = 16 * GIB
# Activations of 8x2048 tokens and the allocator's rounding are beside the weights in the 16 GiB.
ROOM_BYTES = {(1, 1): GIB // 2, (1, 2048): 5 * GIB // 4}
ROOM_DEFAULT = 5 * GIB


@dataclass
class Job:
    folder: Path
    scratch: Path  # on a disk, for those that write a copy of their own
    device: torch.device
    shapes: list[tuple[int, int]]

    def plain(self) -> Any:
        """The model in RAM."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).eval()

    def cool(self) -> None:
        """Drops what every pass reads from the page cache."""
        try:
            coldness.make_cold(self._read())
        except coldness.NotColdError as error:
            print(f"not cold: {error}")

    def cached_bytes(self) -> int:
        """Of what every pass reads, what lies in the page cache."""
        return sum(map(coldness.cached_pages, self._read())) * mmap.PAGESIZE

    def _read(self) -> list[Path]:
        """A peer's own copy, else the checkpoint."""
        own = [path for path in self.scratch.rglob("*") if path.is_file()]
        copied = sum(path.stat().st_size for path in own) > MIB
        return own if copied else sorted(self.folder.glob("*.safetensors"))


# -- each returns what is called -----------------------------------------------------------------


def resident(job: Job) -> Any:
    return job.plain().to(job.device)


def two_buffers(job: Job) -> Any:
    from by_hand import TwoBuffers

    model = job.plain()
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList()
    model.to(job.device)
    model.model.layers = layers
    model._two_buffers = TwoBuffers(layers, job.device)
    return model


def wsm_two_layers(job: Job, in_ram: bool) -> Any:
    """What two buffers hold: places for two layers, and all that is no layer."""
    import wsm_ext as wsm

    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(job.folder))
    arena, homes = 2 * sizes.layer_place_bytes, sizes.ends_place_bytes
    config = {"arena_bytes": arena, "home_bytes": homes}
    if not in_ram:  # of RAM the staging ring alone
        config |= {"cpu_cache_cap_layers": 0, "staging_mb": STAGING_BYTES // MIB}
    return wsm.from_pretrained(
        job.folder,
        device=job.device,
        device_memory=shapes.blocks(arena) + shapes.blocks(homes),
        host_memory=shapes.host_bytes(sizes, STAGING_BYTES) if in_ram else STAGING_BYTES,
        config=config,
    )


def wsm_arena(job: Job) -> Any:
    return wsm_two_layers(job, in_ram=True)


def wsm_disk(job: Job) -> Any:
    return wsm_two_layers(job, in_ram=False)


def wsm_16gib(job: Job) -> Any:
    import wsm_ext as wsm

    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(job.folder))
    room = max(ROOM_BYTES.get(shape, ROOM_DEFAULT) for shape in job.shapes)
    return wsm.from_pretrained(
        job.folder,
        device=job.device,
        device_memory=TOTAL_BYTES - outside_torch(job.device) - room,
        host_memory=shapes.host_bytes(sizes, STAGING_BYTES),
    )


def accelerate_cpu(job: Job) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(job.plain(), execution_device=job.device)


def accelerate_disk(job: Job) -> Any:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(job.folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    layers = {f"model.layers.{i}": "disk" for i in range(config.num_hidden_layers)}
    ends = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return load_checkpoint_and_dispatch(
        model,
        str(job.folder),
        device_map={**layers, **dict.fromkeys(ends, "cpu" if job.device.type == "cpu" else 0)},
        offload_folder=str(job.scratch),
        dtype=torch.bfloat16,
    )


def diffusers(kind: str, to_disk: bool = False) -> Callable[[Job], Any]:
    def make(job: Job) -> Any:
        from diffusers.hooks import apply_group_offloading

        model = job.plain()
        for end in (model.lm_head, model.model.norm, model.model.rotary_emb):
            end.to(job.device)
        settings: dict[str, Any] = {"offload_type": kind, "non_blocking": True}
        if kind == "block_level":
            settings["num_blocks_per_group"] = 1
        if to_disk:
            settings["offload_to_disk_path"] = str(job.scratch)
        if job.device.type == "cuda":
            settings |= {"use_stream": True, "record_stream": True}
        apply_group_offloading(model.model, onload_device=job.device, **settings)
        return model

    return make


def deepspeed_zero3(job: Job) -> Any:
    import deepspeed
    from transformers import AutoConfig
    from transformers.integrations import HfDeepSpeedConfig

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for library in ("NCCL", "GLOO"):  # one rank needs no network, and there may be none
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    config = AutoConfig.from_pretrained(job.folder)
    layer = 4 * config.hidden_size * (config.hidden_size + config.intermediate_size)  # at most
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": True},
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 2 * layer,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": config.hidden_size,
        },
    }
    deepspeed.init_distributed("nccl" if job.device.type == "cuda" else "gloo")
    keep = HfDeepSpeedConfig(settings)  # alive while the model is loaded: from_pretrained looks
    engine = deepspeed.initialize(model=job.plain(), config_params=settings)[0]
    engine.module.eval()
    engine.module._ds_config = keep
    return engine.module


def mmgp(job: Job) -> Any:
    model = job.plain()
    from mmgp import offload  # after the model: it patches safe_open

    model._offload = offload.all(
        {"transformer": model},
        pinnedMemory=True,
        asyncTransfers=True,
        budgets={"*": 6000},
        perc_reserved_mem_max=0.9,  # half by default, of what a virtual machine has grown to so far
        quantizeTransformer=False,
    )
    return model


def airllm(job: Job) -> Any:
    from airllm import AutoModel, airllm_base

    # The checkpoint is random and has no tokenizer.
    airllm_base.AirLLMBaseModel.get_tokenizer = lambda self, hf_token=None: None
    return AutoModel.from_pretrained(
        str(job.folder),
        device=str(job.device),
        dtype=torch.bfloat16,
        layer_shards_saving_path=str(job.scratch),
    )


@dataclass(frozen=True)
class Peer:
    make: Callable[[Job], Any]
    package: str | None = None
    disk: bool = False  # reads the disk in every pass
    ahead: bool = False  # past the page cache; and a pass begins before it is asked for
    only_cuda: bool = True


# What matters most comes first: --total-s may cut the last.
PEERS = {
    "wsm 16 GiB": Peer(wsm_16gib, "wsm_ext"),
    "wsm arena": Peer(wsm_arena, "wsm_ext", only_cuda=False),
    "two buffers": Peer(two_buffers, "torch", only_cuda=False),
    "diffusers leaf": Peer(diffusers("leaf_level"), "diffusers"),
    "diffusers block": Peer(diffusers("block_level"), "diffusers"),
    "resident": Peer(resident, only_cuda=False),
    "mmgp": Peer(mmgp, "mmgp"),
    "accelerate cpu": Peer(accelerate_cpu, "accelerate", only_cuda=False),
    "deepspeed zero3": Peer(deepspeed_zero3, "deepspeed"),
    "wsm disk": Peer(wsm_disk, "wsm_ext", disk=True, ahead=True, only_cuda=False),
    "accelerate disk": Peer(accelerate_disk, "accelerate", disk=True, only_cuda=False),
    "diffusers disk": Peer(diffusers("leaf_level", to_disk=True), "diffusers", disk=True),
    "airllm": Peer(airllm, "airllm", disk=True),
}

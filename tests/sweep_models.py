"""A tiny model of any model type of the installed transformers, and inputs that its forward takes.

Nothing here knows a single model: each config's defaults are made smaller by the names of their
values, in a few ways, until transformers builds and runs what comes out.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

VOCAB = 128
MOST_PARAMETERS = 4_000_000
LARGEST_PARAMETERS = 80_000_000  # rather than none
_FACTORS = (1, 2, 4, 8, 16, 32, 64)

# The class to take, if a type has several: what generates before what does not.
_FIRST = (
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_MULTIMODAL_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_CTC",
    "MODEL_FOR_IMAGE_CLASSIFICATION",
)
# Then the rest, with the bare model last.
_LAST = ("MODEL_FOR_PRETRAINING", "MODEL", "MODEL_FOR_BACKBONE")


def model_types() -> list[str]:
    return sorted(configuration_auto.CONFIG_MAPPING_NAMES)


def class_of(model_type: str) -> type[PreTrainedModel] | None:
    """None if the type is only a part of others, without a class of its own."""
    import transformers

    mappings = {
        name.removesuffix("_MAPPING_NAMES"): getattr(modeling_auto, name)
        for name in dir(modeling_auto)
        if name.endswith("_MAPPING_NAMES") and name != "CONFIG_MAPPING_NAMES"
    }
    others = sorted(mappings.keys() - {*_FIRST, *_LAST})
    for mapping in (*_FIRST, *others, *_LAST):
        named = mappings.get(mapping, {}).get(model_type)
        if named is not None:
            name = named if isinstance(named, str) else named[0]
            found: Any = getattr(transformers, name, None)
            if found is not None:
                return found  # type: ignore[no-any-return]
    return None


# -- configs ---------------------------------------------------------------------------------------

_LAYERS = re.compile(r"(\w*_)?(n_layers?|layers|num_blocks|depth|num_layers_\w+)$")
_WIDTHS = re.compile(
    r"(\w*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|dim|intermediate_size|ffn_dim|d_ff"
    r"|n_inner|hidden_dim|projection_dim|mlp_dim|d_inner|lru_width|model_dim|ffn_hidden_size"
    r"|expand_dim|encoder_dim|width|embeddings_size|inner_dim|filter_size|proj_dim|channels)$"
)
_HEADS = re.compile(r"(\w*_)?(heads|n_head|num_attention_heads|head_count|kv_heads|groups)$")
_EXPERTS = re.compile(r"(\w*_)?(num_experts|num_local_experts|n_routed_experts|experts_num)$")
_CHOSEN = re.compile(r"(\w*_)?(experts_per_tok|experts_per_token|moe_k|moe_topk|top_k_experts)$")
_KEPT = re.compile(r"(vision_|image_|num_)?(num_channels|in_channels|in_chans|out_channels)$")
_FIXED = {
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_kv_shared_layers": 0,
    "num_nextn_predict_layers": 0, "n_shared_experts": 1, "num_mtp_layers": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a config is made smaller."""

    cut_layers: bool
    cut_images: bool
    factor: int


def ways() -> Iterator[Way]:
    for layers, images in itertools.product((True, False), (True, False)):
        for factor in _FACTORS:
            yield Way(layers, images, factor)


def shrunk(config: PreTrainedConfig, way: Way) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    for part in _parts(config):
        _shrink(part, way)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        _set(config, "decoder_start_token_id", 3)  # checkpoints have one, defaults may not
    return config


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    found = [config]
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            found += _parts(value)
    return found


def _shrink(config: PreTrainedConfig, way: Way) -> None:
    values = dict(vars(config))
    if way.cut_layers:
        _cut_layers(config, values)
    special = itertools.count(VOCAB - 1, -1)
    for name, value in values.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, (list, tuple)) and name in (
            "depths",
            "encoder_depths",
            "layer_depths",
        ):
            if way.cut_layers:
                _set(config, name, type(value)(min(v, 1) for v in value))
            continue
        if not isinstance(value, int):
            continue
        if re.search(r"(^|_)vocab(ulary)?_size$|^n_vocab$", name):
            _set(config, name, min(value, VOCAB))
        elif re.search(r"token_(id|index)$", name) and value >= VOCAB - 40:
            _set(config, name, next(special))
        elif name in _FIXED:
            _set(config, name, min(value, _FIXED[name]))
        elif _EXPERTS.match(name):
            _set(config, name, min(value, 4))
        elif _CHOSEN.match(name):
            _set(config, name, min(value, 2))
        elif way.cut_images and name in ("image_size", "img_size", "input_size"):
            patch = values.get("patch_size")
            small = 4 * patch if isinstance(patch, int) else 64
            _set(config, name, min(value, max(small, 32)))
        elif _KEPT.match(name):
            continue
        elif _HEADS.match(name) and value > 1:
            _set(config, name, max(1, value // way.factor))
        elif _WIDTHS.match(name) and value >= 16:
            _set(config, name, max(8, value // way.factor))


def _cut_layers(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """Two layers, or one of each kind, if a list names their kinds."""
    for name, count in values.items():
        if type(count) is not int or count <= 2 or not _LAYERS.match(name) or name in _FIXED:
            continue
        kept = [0, 1]
        for value in values.values():
            if isinstance(value, (list, tuple)) and len(value) == count:
                kinds: dict[str, int] = {}
                for index, kind in enumerate(value):
                    kinds.setdefault(repr(kind), index)
                if 2 < len(kinds) <= 4 or list(kinds.values()) != [0, 1][: len(kinds)]:
                    kept = sorted({*kinds.values(), 0})[:4]
        if len(kept) == 1:
            kept = [0, 1]
        for other, value in values.items():
            if isinstance(value, (list, tuple)) and len(value) == count:
                _set(config, other, type(value)(value[i] for i in kept))
        _set(config, name, len(kept))


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a property, or a value that its class refuses
        return


def candidates(cls: type[PreTrainedModel]) -> Iterator[PreTrainedConfig]:
    """Configs of which transformers builds a model, those that are small enough first."""
    config_class: Any = cls.config_class
    default = config_class()
    larger: list[tuple[int, PreTrainedConfig]] = []
    seen: set[str] = set()
    for way in ways():
        try:
            config = shrunk(default, way)
            text = str(config.to_dict())
            if text in seen:
                continue
            seen.add(text)
            with torch.device("meta"):
                model = cls(copy.deepcopy(config))
        except Exception:  # a size that does not go with another one
            continue
        size = sum(parameter.numel() for parameter in model.parameters())
        if size <= MOST_PARAMETERS:
            yield config
        else:
            larger.append((size, config))
    for size, config in sorted(larger, key=lambda pair: pair[0])[:3]:
        if size <= LARGEST_PARAMETERS:
            yield config


# -- inputs ----------------------------------------------------------------------------------------

_IDS = torch.tensor([[12, 19, 27, 33, 45, 22, 14, 38]])


def _sizes(config: PreTrainedConfig, *names: str) -> list[int]:
    found: list[int] = []
    for part in _parts(config):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value and isinstance(value[-1], int):
                value = value[-1]
            if type(value) is int and value not in found:
                found.append(value)
    return found


def _ramp(*shape: int) -> torch.Tensor:
    count = 1
    for size in shape:
        count *= size
    return torch.linspace(-1, 1, count).reshape(shape)


def _images(config: PreTrainedConfig) -> list[torch.Tensor]:
    channels = (_sizes(config, "num_channels", "in_channels", "in_chans") or [3])[0]
    sizes = _sizes(config, "image_size", "img_size", "input_size") or [64]
    frames = (_sizes(config, "num_frames", "frames_per_clip") or [2])[0]
    found = [_ramp(1, channels, size, size) for size in (*sizes[:2], 64, 224)]
    found += [_ramp(1, frames, channels, size, size) for size in sizes[:2]]
    found += [_ramp(1, 2, channels, size, size) for size in sizes[:1]]
    found += [_ramp(1, channels, frames, size, size) for size in sizes[:1]]
    return found


def _sounds(config: PreTrainedConfig) -> list[torch.Tensor]:
    bins = _sizes(
        config, "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", "input_size"
    )
    positions = _sizes(config, "max_source_positions")
    lengths = [2 * positions[0]] if positions else []
    found = [_ramp(1, b, n) for b in bins or [80] for n in (*lengths, 64)]
    found += [_ramp(1, n, b) for b in bins or [80] for n in (64, *_sizes(config, "max_length"))]
    return [*found, _ramp(1, 4000), _ramp(1, 1, 4000), _ramp(1, 16000)]


_TWICE = torch.arange(8)[None]
_MAKERS: dict[str, Callable[[PreTrainedConfig], list[Any]]] = {
    "input_ids": lambda c: [_IDS],
    "decoder_input_ids": lambda c: [_IDS[:, :4]],
    "pixel_values": _images,
    "pixel_values_videos": _images,
    "input_features": _sounds,
    "input_values": lambda c: [_ramp(1, 4000), *_sounds(c)],
    "bbox": lambda c: [torch.zeros((1, 8, 4), dtype=torch.long)],
    "inputs": lambda c: [_IDS, *_images(c)],
    "inputs_embeds": lambda c: [_ramp(1, 8, size) for size in _sizes(c, "hidden_size", "d_model")],
    "hidden_states": lambda c: [_ramp(1, 8, size) for size in _sizes(c, "hidden_size", "d_model")],
    "past_values": lambda c: [
        _ramp(1, length, channels) if channels else _ramp(1, length)
        for length in [*_sizes(c, "context_length", "prediction_length"), 64]
        for channels in (*_sizes(c, "num_input_channels"), 1, 0)
    ],
    "audio_values": lambda c: [_ramp(1, 1, 4000), _ramp(1, 4000)],
    "audio_codes": lambda c: [_IDS[:, None, :]],
    "speech": lambda c: [_ramp(1, 4000)],
}


def inputs_for(model: PreTrainedModel, most: int = 60) -> Iterator[dict[str, Any]]:
    """Inputs to try: what the forward demands, with the main one; then pairs of kinds."""
    parameters = inspect.signature(model.forward).parameters
    demanded = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    main = getattr(model, "main_input_name", "input_ids")
    known = [name for name in _MAKERS if name in parameters]
    sets: list[list[str]] = []
    for names in (
        [*demanded, main],
        ["input_ids"],
        ["input_ids", "decoder_input_ids"],
        ["input_ids", "pixel_values"],
        [main, "decoder_input_ids"],
        ["input_ids", "bbox"],
        ["input_ids", "bbox", "pixel_values"],
        ["input_ids", "input_values"],
        *([name] for name in known),
    ):
        wanted = [name for name in dict.fromkeys(names) if name in parameters]
        if model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
            sets.append([*dict.fromkeys([*wanted, "decoder_input_ids"])])
        sets.append(wanted)
    tried: set[tuple[str, ...]] = set()
    produced = 0
    for wanted in sets:
        key = tuple(sorted(wanted))
        if not wanted or key in tried or not all(name in _MAKERS for name in wanted):
            continue
        tried.add(key)
        values = [_MAKERS[name](model.config) for name in wanted]
        for chosen in itertools.product(*values):
            yield dict(zip(wanted, chosen, strict=True))
            produced += 1
            if produced >= most:
                return


def run(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors that the forward gives. What it draws at random is drawn alike each time."""
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = model(**copied(inputs))
    return [leaf for leaf in tree_leaves(_plain(outputs)) if isinstance(leaf, torch.Tensor)]


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """Some models write to what they are given: BLIP to its ids."""
    return {name: value.clone() for name, value in inputs.items()}


def _plain(value: Any) -> Any:
    """What an output or a cache holds, as dicts and lists."""
    if isinstance(value, torch.Tensor) or value is None:
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if type(value).__module__.startswith("transformers") and hasattr(value, "__dict__"):
        return {key: _plain(item) for key, item in vars(value).items()}
    return None


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
        return False
    return all(
        bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in zip(ours, theirs, strict=True)
    )


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    """What of two forwards differs, and by how much."""
    if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
        return "other shapes or dtypes"
    parts = []
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not same([a], [b]):
            wrong = ~((a == b) | ((a != a) & (b != b)))
            off, size = (a.double() - b.double()).abs().max(), b.double().abs().max()
            parts.append(
                f"output {number}: {int(wrong.sum())} of {a.numel()}, {off:.2g} of {size:.2g}"
            )
    return "; ".join(parts)

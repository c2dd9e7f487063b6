"""The workload of a transformers model if nobody states one."""

from __future__ import annotations

from torch import nn

_DEFAULT_TOKENS = 4096


class DefaultWorkload(tuple[int, int]):
    """A workload that nobody stated: if the trial fails, nothing is said."""


def default_workload(module: nn.Module) -> DefaultWorkload:
    """One sequence of 4096 tokens, or as long as the transformers model takes."""
    config = module.config.get_text_config()  # type: ignore[operator, union-attr]
    longest = getattr(config, "max_position_embeddings", None) or _DEFAULT_TOKENS
    return DefaultWorkload((1, min(_DEFAULT_TOKENS, int(longest))))

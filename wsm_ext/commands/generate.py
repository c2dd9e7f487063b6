"""`wsm generate`: continues a text."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..runtime.request import resolve_device
from . import report
from .loading import folder_of, load
from .options import (
    Commands,
    check_trace,
    count,
    device_options,
    streaming_options,
    trace_options,
)


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "generate",
        parents=[streaming_options(), trace_options(), device_options()],
        help="continue a text",
        description="Stream a model and continue a text; the model's folder must have a tokenizer.",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "--max-new-tokens", type=count, default=64, metavar="N", help="stop after N tokens (64)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    console = Console()
    check_trace(options)
    device = resolve_device(options.device)
    folder = folder_of(options)
    tokenizer = _tokenizer(folder)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(device)
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise ValueError("--prompt holds no token")
    options.revision = None  # the folder is that revision
    with load(options, folder, device) as (model, load_seconds):
        streamer = _timed_streamer(tokenizer)
        with report.traced(model, options.trace):
            begin = time.perf_counter()
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=options.max_new_tokens,
                do_sample=False,
                streamer=streamer,
            )
            report.synchronize(device)
            seconds = time.perf_counter() - begin
        figures = {
            "prompt_tokens": prompt_tokens,
            "new_tokens": output.shape[1] - prompt_tokens,
            "first_seconds": streamer.first_token_at - begin,
            "seconds": seconds,
        }
        report.print_generation(console, **figures, device=device)
        report.print_trace(console, options.trace, "the generation")
        text = tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)
        if options.json:
            content = report.document(
                options.command_line,
                device,
                model,
                load_s=load_seconds,
                model=options.model,
                generation={**figures, "text": text},
            )
            report.write_json(options.json, content)
    return 0


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for files that are not there
        raise ValueError(
            f"{folder} has no tokenizer that transformers can load; `wsm prefill` needs none"
        ) from error


def _timed_streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Timed(TextStreamer):
        """Prints the text as it comes and notes when the first new token came."""

        first_token_at = 0.0
        puts = 0

        def put(self, value: torch.Tensor) -> None:
            self.puts += 1
            if self.puts == 2:  # the first is the prompt
                self.first_token_at = time.perf_counter()
            super().put(value)

    return Timed(tokenizer, skip_prompt=True, skip_special_tokens=True)

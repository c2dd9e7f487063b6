"""What each command of `wsm` does. They take the parsed options and return the exit status."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import TimeRemainingColumn

from ..runtime.trace import check_target
from . import plan_report, report
from .demo import SIZES, run_demo
from .loading import load, progress_bar, settings, units


def plan(options: argparse.Namespace) -> int:
    from ..hf.building import prepare

    device = report.resolve_device(options.device)
    folder = _folder(options)
    module, checkpoint = prepare(folder, dtype=options.dtype)
    preview = plan_report.preview(
        module,
        checkpoint,
        device=device,
        device_memory=options.device_memory,
        host_memory=options.host_memory,
        units=units(options),
        config=settings(options),
        workload=(options.batch, options.tokens),
    )
    plan_report.print_preview(Console(), options.model, preview)
    if options.json:
        content = {"command": options.command_line, "model": options.model, **preview.as_dict()}
        report.write_json(options.json, content)
    return 0


def prefill(options: argparse.Namespace) -> int:
    console = Console()
    _check_trace(options)
    device = report.resolve_device(options.device)
    with load(options, options.model, device) as (model, load_seconds):
        model.expect(options.batch, options.tokens)
        report.print_plan(console, model)
        result = report.run_prefills(
            model,
            device=device,
            vocab=model.config.get_text_config().vocab_size,
            batch=options.batch,
            tokens=options.tokens,
            repeat=options.repeat,
            trace=options.trace,
        )
        report.print_prefills(console, result, load_seconds=load_seconds)
        report.print_trace(console, options.trace, "the last prefill")
        plan_report.print_comparison(console, model.plan)
        _write(
            options,
            device,
            model,
            load_s=load_seconds,
            model=options.model,
            prefill=result.as_dict(),
            **plan_report.outcome(model.plan),
        )
    return 0


def generate(options: argparse.Namespace) -> int:
    console = Console()
    _check_trace(options)
    device = report.resolve_device(options.device)
    folder = _folder(options)
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
        _write(
            options,
            device,
            model,
            load_s=load_seconds,
            model=options.model,
            generation={**figures, "text": text},
        )
    return 0


def bench(options: argparse.Namespace) -> int:
    from .bench import print_bench, run_bench

    device = report.resolve_device(options.device)
    folder = _folder(options)
    options.revision = None  # the folder is that revision

    @contextmanager
    def open_model(**replaced: Any) -> Iterator[Any]:
        with load(options, folder, device, **replaced) as (model, _):
            yield model

    result = run_bench(
        folder,
        device=device,
        open_model=open_model,
        batch=options.batch,
        tokens=options.tokens,
        passes=options.passes,
        step=lambda what: print(f"measuring {what}", file=sys.stderr, flush=True),
    )
    print_bench(Console(), result)
    if options.json:
        content = report.setting(options.command_line, device)
        report.write_json(options.json, {**content, "model": options.model, "bench": result})
    return 0


def verify(options: argparse.Namespace) -> int:
    from ..checkpoints.checkpoint import Checkpoint
    from ..checkpoints.verify import verify as hash_and_compare
    from .verify import print_verified

    path = Path(options.model).expanduser()
    if options.revision is not None or not path.exists():
        path = _folder(options)
    with progress_bar("hashing", TimeRemainingColumn()) as progress:
        result = hash_and_compare(
            Checkpoint.open(path), options.sidecar, update=options.update, progress=progress
        )
    print_verified(Console(), result)
    if options.json:
        content = report.setting(options.command_line, torch.device("cpu"))
        report.write_json(
            options.json, {**content, "model": options.model, "verify": result.as_dict()}
        )
    return 0 if result.equal else 1


def demo(options: argparse.Namespace) -> int:
    device = report.resolve_device(options.device)
    content = run_demo(Console(), device=device, keep=options.keep, size=SIZES[options.size])
    content["command"] = options.command_line
    if options.json:
        report.write_json(options.json, content)
    return 0 if content["bit_equal"] else 1


def _folder(options: argparse.Namespace) -> Path:
    """Of the model, here or in the hub's cache; may download it."""
    from ..hf.hub import resolve_folder

    return resolve_folder(
        options.model, revision=options.revision, local_files_only=options.local_files_only
    )


def _check_trace(options: argparse.Namespace) -> None:
    """Before a model is loaded for minutes."""
    if options.trace is not None:
        check_target(Path(options.trace))


def _tokenizer(folder: Any) -> Any:
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


def _write(
    options: argparse.Namespace, device: torch.device, model: Any, /, **results: Any
) -> None:
    if options.json:
        content = report.document(options.command_line, device, model, **results)
        report.write_json(options.json, content)

"""`wsm prefill`: times prefills of random tokens."""

from __future__ import annotations

import argparse

from rich.console import Console

from ..runtime.request import resolve_device
from . import plan_report, report
from .loading import load
from .options import (
    Commands,
    check_trace,
    count,
    device_options,
    streaming_options,
    trace_options,
    workload_options,
)


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "prefill",
        parents=[streaming_options(), workload_options(), trace_options(), device_options()],
        help="time prefills of random tokens",
        description="Stream a model and time prefills of random tokens: rates, stalls, memory.",
    )
    parser.add_argument("--repeat", type=count, default=3, metavar="N", help="prefills to run (3)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    console = Console()
    check_trace(options)
    device = resolve_device(options.device)
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
        if options.json:
            content = report.document(
                options.command_line,
                device,
                model,
                load_s=load_seconds,
                model=options.model,
                prefill=result.as_dict(),
                **plan_report.outcome(model.plan),
            )
            report.write_json(options.json, content)
    return 0

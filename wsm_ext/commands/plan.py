"""`wsm plan`: the plan of a model that is not loaded, and the pass that it should give."""

from __future__ import annotations

import argparse

from rich.console import Console

from ..planning.workload import WorkloadSize
from ..runtime.request import resolve_device
from . import report
from .loading import folder_of
from .options import (
    Commands,
    device_options,
    settings_of,
    streaming_options,
    units_of,
    workload_options,
)
from .plan_report import print_preview
from .preview import preview_of


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "plan",
        parents=[streaming_options(), workload_options(), device_options()],
        help="show where the weights would live and how long a pass should take",
        description="Plan for a model without loading it: where its bytes would live, what each "
        "link would take, which one limits, and what more memory would bring. Disk, link and one "
        "layer are measured, or taken from a measurement of the last 30 days.",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..hf.building import prepare

    device = resolve_device(options.device)
    module, checkpoint = prepare(folder_of(options), dtype=options.dtype)
    preview = preview_of(
        module,
        checkpoint,
        device=device,
        device_memory=options.device_memory,
        host_memory=options.host_memory,
        units=units_of(options),
        config=settings_of(options),
        workload=WorkloadSize(options.batch, options.tokens),
    )
    print_preview(Console(), options.model, preview)
    if options.json:
        content = {"command": options.command_line, "model": options.model, **preview.as_dict()}
        report.write_json(options.json, content)
    return 0

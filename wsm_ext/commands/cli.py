"""The command `wsm`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from .. import __version__
from ..streaming.trace import check_target
from . import plan_report, report
from .demo import SIZES, run_demo

_BAD_INPUT = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 is success, 1 bits that differ (demo, verify), 2 an error, 130 an
    interruption."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    options.command_line = ["wsm", *arguments]
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("wsm: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        print(f"wsm: error: {_one_line(error)} (--debug shows where)", file=sys.stderr)
        return _BAD_INPUT


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # Only of these does the text alone say enough; a KeyError's is a bare name.
    clear = isinstance(error, (ValueError, OSError)) and text
    return text if clear else f"{type(error).__name__}: {text}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wsm",
        description="Run models that do not fit in memory: "
        "weights are streamed from the disk while computing.",
    )
    parser.add_argument("--version", action="version", version=f"wsm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common, streaming, workload, traced = _common(), _streaming(), _workload(), _traced()

    plan = commands.add_parser(
        "plan",
        parents=[streaming, workload, common],
        help="show where the weights would live and how long a pass should take",
        description="Plan for a model without loading it: where its bytes would live, what each "
        "link would take, which one limits, and what more memory would bring. Disk, link and one "
        "layer are measured, or taken from a measurement of the last 30 days.",
    )
    plan.set_defaults(run=_plan)

    prefill = commands.add_parser(
        "prefill",
        parents=[streaming, workload, traced, common],
        help="time prefills of random tokens",
        description="Stream a model and time prefills of random tokens: rates, stalls, memory.",
    )
    prefill.add_argument(
        "--repeat", type=_count, default=3, metavar="N", help="prefills to run (3)"
    )
    prefill.set_defaults(run=_prefill)

    generate = commands.add_parser(
        "generate",
        parents=[streaming, traced, common],
        help="continue a text",
        description="Stream a model and continue a text; the model's folder must have a tokenizer.",
    )
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    generate.add_argument(
        "--max-new-tokens", type=_count, default=64, metavar="N", help="stop after N tokens (64)"
    )
    generate.set_defaults(run=_generate)

    bench = commands.add_parser(
        "bench",
        parents=[streaming, common],
        help="measure this machine's links, and how close passes come to them",
        description="Measure the link to the device and the disk under the model's files, then "
        "passes of the streamed model: by the budgets given, from RAM, and from a cold disk. Says "
        "which link limits each, and how close it comes.",
    )
    bench.add_argument("--batch", type=_count, default=1, metavar="B", help="sequences (1)")
    bench.add_argument("--tokens", type=_count, default=128, metavar="T", help="of each (128)")
    bench.add_argument("--passes", type=_count, default=3, metavar="N", help="of each run (3)")
    bench.set_defaults(run=_bench)

    verify = commands.add_parser(
        "verify",
        parents=[_outputs()],
        help="hash a model's tensors, and compare them with the hashes later",
        description="Read every tensor of a checkpoint once and hash it. The first time, the "
        "hashes are written to a file beside the model. After that they are compared with it: the "
        "exit status is 1 if a tensor differs, is missing, is new, or has another dtype or shape. "
        "`--verify` of the other commands checks by that file what they load.",
    )
    verify.add_argument(
        "model", metavar="MODEL", help="a model's folder, a safetensors file, or an id on the hub"
    )
    verify.add_argument(
        "--sidecar", type=Path, metavar="FILE", help="the file of hashes, where not beside MODEL"
    )
    verify.add_argument(
        "--update", action="store_true", help="write the hashes anew, of MODEL as it is now"
    )
    verify.add_argument("--revision", metavar="REV", help="the hub revision")
    verify.add_argument("--local-files-only", action="store_true", help="ask the hub's cache only")
    verify.set_defaults(run=_verify)

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="stream a small synthetic model and check its bits",
        description="Make a small Llama, stream it under budgets far smaller than it, and compare "
        "logits and tokens bit for bit with the resident model. The exit status is 1 if they "
        "differ.",
    )
    demo.add_argument("--keep", metavar="FOLDER", help="make the checkpoint there, and keep it")
    demo.add_argument("--size", choices=sorted(SIZES), default="small", help=argparse.SUPPRESS)
    demo.set_defaults(run=_demo)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _common() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[_outputs()])
    parser.add_argument(
        "--device", metavar="DEVICE", help="cuda, cuda:1 or cpu (a GPU where there is one)"
    )
    return parser


def _outputs() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _workload() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--batch", type=_count, default=1, metavar="B", help="sequences (1)")
    parser.add_argument(
        "--tokens", type=_count, default=2048, metavar="T", help="tokens of each (2048)"
    )
    return parser


def _traced() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write a timeline to FILE, for ui.perfetto.dev: of the last prefill, or of all of a "
        "generation",
    )
    return parser


def _streaming() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("model", metavar="MODEL", help="a model's folder, or its id on the hub")
    parser.add_argument(
        "--device-memory",
        default="auto",
        metavar="SIZE",
        help='weights on the device, as "12GiB" (auto)',
    )
    parser.add_argument(
        "--host-memory",
        default="auto",
        metavar="SIZE",
        help='pinned host memory, as "48GiB" (auto)',
    )
    parser.add_argument(
        "--units",
        default="auto",
        metavar="UNITS",
        help="auto, layer, group, leaf, or module names with commas between",
    )
    parser.add_argument(
        "--lookahead", type=int, metavar="N", help="units kept in flight ahead of the running one"
    )
    parser.add_argument("--reader", choices=("auto", "uring", "pread"), help="how files are read")
    parser.add_argument("--direct", choices=("auto", "on", "off"), help="read past the page cache")
    parser.add_argument(
        "--dtype", default="auto", help="what to compute in; tensors of another dtype are cast"
    )
    parser.add_argument("--revision", metavar="REV", help="the hub revision")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check each unit by the hashes of `wsm verify` as it is loaded",
    )
    parser.add_argument(
        "--no-measure", action="store_true", help="plan by rules, without measuring anything"
    )
    parser.add_argument("--local-files-only", action="store_true", help="ask the hub's cache only")
    return parser


def _plan(options: argparse.Namespace) -> int:
    from ..streaming.pretrained import resolve_folder
    from ..streaming.transformers_loader import prepare

    device = report.resolve_device(options.device)
    folder = resolve_folder(
        options.model, revision=options.revision, local_files_only=options.local_files_only
    )
    module, checkpoint = prepare(folder, dtype=options.dtype)
    preview = plan_report.preview(
        module,
        checkpoint,
        device=device,
        device_memory=options.device_memory,
        host_memory=options.host_memory,
        units=_units(options),
        config=_settings(options),
        workload=(options.batch, options.tokens),
    )
    plan_report.print_preview(Console(), options.model, preview)
    if options.json:
        content = {"command": options.command_line, "model": options.model, **preview.as_dict()}
        report.write_json(options.json, content)
    return 0


def _prefill(options: argparse.Namespace) -> int:
    console = Console()
    _check_trace(options)
    device = report.resolve_device(options.device)
    with _load(options, options.model, device) as (model, load_seconds):
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


def _generate(options: argparse.Namespace) -> int:
    console = Console()
    _check_trace(options)
    from ..streaming.pretrained import resolve_folder

    device = report.resolve_device(options.device)
    folder = resolve_folder(
        options.model, revision=options.revision, local_files_only=options.local_files_only
    )
    tokenizer = _tokenizer(folder)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(device)
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise ValueError("--prompt holds no token")
    options.revision = None  # the folder is that revision
    with _load(options, folder, device) as (model, load_seconds):
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


def _bench(options: argparse.Namespace) -> int:
    from ..streaming.pretrained import resolve_folder
    from . import bench

    device = report.resolve_device(options.device)
    folder = resolve_folder(
        options.model, revision=options.revision, local_files_only=options.local_files_only
    )
    options.revision = None  # the folder is that revision

    @contextmanager
    def open_model(**replaced: Any) -> Iterator[Any]:
        with _load(options, folder, device, **replaced) as (model, _):
            yield model

    result = bench.run_bench(
        folder,
        device=device,
        open_model=open_model,
        batch=options.batch,
        tokens=options.tokens,
        passes=options.passes,
        step=lambda what: print(f"measuring {what}", file=sys.stderr, flush=True),
    )
    bench.print_bench(Console(), result)
    if options.json:
        content = report.setting(options.command_line, device)
        report.write_json(options.json, {**content, "model": options.model, "bench": result})
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ..checkpoints.checkpoint import Checkpoint
    from ..checkpoints.verify import print_verified, verify

    path = Path(options.model).expanduser()
    if options.revision is not None or not path.exists():
        from ..streaming.pretrained import resolve_folder

        path = resolve_folder(
            options.model, revision=options.revision, local_files_only=options.local_files_only
        )
    with _progress("hashing", TimeRemainingColumn()) as progress:
        result = verify(
            Checkpoint.open(path), options.sidecar, update=options.update, progress=progress
        )
    print_verified(Console(), result)
    if options.json:
        content = report.setting(options.command_line, torch.device("cpu"))
        report.write_json(
            options.json, {**content, "model": options.model, "verify": result.as_dict()}
        )
    return 0 if result.equal else 1


def _demo(options: argparse.Namespace) -> int:
    device = report.resolve_device(options.device)
    content = run_demo(Console(), device=device, keep=options.keep, size=SIZES[options.size])
    content["command"] = options.command_line
    if options.json:
        report.write_json(options.json, content)
    return 0 if content["bit_equal"] else 1


def _check_trace(options: argparse.Namespace) -> None:
    """Before a model is loaded for minutes."""
    if options.trace is not None:
        check_target(Path(options.trace))


def _units(options: argparse.Namespace) -> Any:
    named = options.units not in ("auto", "layer", "group", "leaf")
    return options.units.split(",") if named else options.units


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    settings = {
        "lookahead_units": options.lookahead,
        "reader": options.reader,
        "direct": options.direct,
        "measure": False if options.no_measure else None,
        "verify": True if options.verify else None,
    }
    return {key: value for key, value in settings.items() if value is not None}


@contextmanager
def _load(
    options: argparse.Namespace, path: Any, device: torch.device, **replaced: Any
) -> Iterator[tuple[Any, float]]:
    """The model as the options say; `replaced`: budgets, and settings added to theirs."""
    from ..streaming.pretrained import from_pretrained

    settings = _settings(options) | replaced.pop("config", {})
    budgets = {"device_memory": options.device_memory, "host_memory": options.host_memory}
    begin = time.perf_counter()
    with _progress("loading resident weights") as progress:
        model = from_pretrained(
            path,
            dtype=options.dtype,
            device=device,
            **{**budgets, **replaced},
            units=_units(options),
            config={key: value for key, value in settings.items() if value is not None},
            revision=options.revision,
            local_files_only=options.local_files_only,
            progress=progress,
        )
    with model:
        yield model, time.perf_counter() - begin


@contextmanager
def _progress(what: str, *more: Any) -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        *more,
    )
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("")

    def update(done: int, total: int) -> None:
        if total == 0:  # nothing is loaded first: nothing is shown
            return
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


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

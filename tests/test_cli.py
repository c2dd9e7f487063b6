import io
import json
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from wsm_ext import _engine, pretrained
from wsm_ext.commands import cli, demo, plan
from wsm_ext.hf.synthetic import make_llama_checkpoint
from wsm_ext.planning import measure

# More than 2 MiB of layers: the least that a block of device memory costs.
TINY = {"layers": 12, "hidden": 128, "intermediate": 352, "heads": 4, "kv_heads": 2, "vocab": 256}
BUDGETS = ["--device", "cpu", "--device-memory", "2MiB", "--host-memory", "1MiB"]


@pytest.fixture
def folder(tmp_path):
    return make_llama_checkpoint(tmp_path / "model", shards=2, **TINY)


@pytest.fixture
def with_tokenizer(folder):
    words = {f"w{number}": number for number in range(TINY["vocab"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["prefill", "--help"], ["--version"]])
def test_help_and_version(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 0
    assert "wsm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["prefil"], ["prefill"], ["prefill", "m", "--reader", "mmap"], ["generate", "m"]],
)
def test_a_wrong_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: wsm" in capsys.readouterr().err


def test_without_a_command_it_prints_the_help(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert "usage: wsm" in printed
    for command in ("plan", "prefill", "generate", "bench", "verify", "demo"):
        assert re.search(rf"^ +{command} +\w", printed, re.MULTILINE)


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "wsm_ext", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("wsm ")


def test_prefill_prints_its_figures_and_writes_them(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    work = [
        "--batch",
        "2",
        "--tokens",
        "5",
        "--repeat",
        "4",
        "--lookahead",
        "1",
        "--reader",
        "pread",
    ]
    arguments = ["prefill", str(folder), *BUDGETS, *work, "--json", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for part in ("prefill of 2 x 5 tokens, 4 times", "time to first token", "disk to host"):
        assert part in printed
    content = json.loads(out.read_text())
    assert content["command"] == ["wsm", *arguments]
    assert content["plan"]["lookahead_units"] == 1
    assert content["prefill"]["batch"] == 2
    assert len(content["prefill"]["passes"]) == 4
    assert all(entry["disk_bytes"] > 0 for entry in content["prefill"]["passes"])
    assert {reader["reader"] for reader in content["stats"]["readers"].values()} == {"pread"}


def test_traces_are_of_the_last_prefill_or_the_whole_generation(with_tokenizer, tmp_path, capsys):
    def passes_after(*arguments):
        out = tmp_path / "trace.json"
        assert cli.main([*arguments, *BUDGETS, "--no-measure", "--trace", str(out)]) == 0
        printed = capsys.readouterr().out.replace("\n", "")
        assert f"{out}; open it in https://ui.perfetto.dev" in printed
        events = json.loads(out.read_text())["traceEvents"]
        assert {"read", "copy", "forward"} <= {event.get("cat") for event in events}
        return sum(event.get("cat") == "pass" for event in events)

    model = str(with_tokenizer)
    assert passes_after("prefill", model, "--tokens", "4", "--repeat", "2") == 1
    assert passes_after("generate", model, "--prompt", "w1 w2", "--max-new-tokens", "3") == 3


def test_a_trace_that_cannot_be_written_is_refused_before_loading(tmp_path, capsys):
    for command in (["prefill"], ["generate", "--prompt", "w1"]):
        asked = [*command, str(tmp_path / "no model"), "--trace", str(tmp_path / "no" / "folder")]
        assert "a trace cannot be written" in failure(asked, capsys)


def test_generate_continues_the_prompt_as_the_resident_model_does(with_tokenizer, tmp_path, capsys):
    out = tmp_path / "out.json"
    prompt = "w3 w1 w4"
    asked = ["--prompt", prompt, "--max-new-tokens", "6", "--json", str(out)]
    assert cli.main(["generate", str(with_tokenizer), *BUDGETS, *asked]) == 0
    resident = AutoModelForCausalLM.from_pretrained(with_tokenizer, dtype="auto")
    ids = resident.generate(torch.tensor([[3, 1, 4]]), max_new_tokens=6, do_sample=False)[0, 3:]
    text = " ".join(f"w{number}" for number in ids.tolist())
    assert text in capsys.readouterr().out
    figures = json.loads(out.read_text())["generation"]
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (3, 6)
    assert figures["text"] == text
    assert 0 < figures["first_seconds"] < figures["seconds"]


def failure(arguments, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--device", "mps"], "mps"),
        (["--device-memory", "lots"], "device_memory"),
        (["--host-memory", "1KiB"], "host_.* too small"),
        (["--dtype", "float17"], "float17"),
        (["--units", "model.layers.99"], "model.layers.99"),
        (["--lookahead", "-1"], "lookahead_units"),
    ],
)
def test_errors_are_one_line_that_names_the_cause(folder, capsys, change, message):
    error = failure(["prefill", str(folder), *BUDGETS, *change], capsys)
    assert error.startswith("wsm: error: ")
    assert re.search(message, error)


def test_missing_models_and_tokenizers_are_errors(folder, tmp_path, capsys):
    assert "no such folder" in failure(["prefill", str(tmp_path / "gone")], capsys)
    asked = ["generate", str(folder), "--prompt", "w1"]
    assert "has no tokenizer" in failure(asked, capsys)


def test_an_empty_prompt_is_an_error(with_tokenizer, capsys):
    assert "no token" in failure(["generate", str(with_tokenizer), "--prompt", ""], capsys)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        cli.main(["prefill", str(tmp_path / "gone"), "--debug"])


def test_other_errors_say_their_kind_and_interruptions_exit_with_130(folder, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise KeyError("layers")

    monkeypatch.setattr(pretrained, "from_pretrained", fail)
    assert "KeyError: 'layers'" in failure(["prefill", str(folder)], capsys)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "from_pretrained", interrupt)
    assert cli.main(["prefill", str(folder)]) == 130


def test_every_option_reaches_the_loader(folder, monkeypatch, capsys):
    seen = {}

    def capture(path, **options):
        seen.update(options, path=path)
        raise ValueError("captured")

    monkeypatch.setattr(pretrained, "from_pretrained", capture)
    options = {
        "--device-memory": "1GiB", "--host-memory": "2GiB", "--units": "model.norm,lm_head",
        "--lookahead": "5", "--reader": "uring", "--direct": "off", "--dtype": "bfloat16",
        "--revision": "v1",
    }  # fmt: skip
    flat = [part for pair in options.items() for part in pair]
    switches = ["--local-files-only", "--no-measure", "--verify"]
    failure(["prefill", "owner/name", "--device", "cpu", *flat, *switches], capsys)
    del seen["progress"]
    assert seen == {
        "path": "owner/name",
        "device": torch.device("cpu"),
        "device_memory": "1GiB",
        "host_memory": "2GiB",
        "units": ["model.norm", "lm_head"],
        "config": {
            "lookahead_units": 5,
            "reader": "uring",
            "direct": "off",
            "measure": False,
            "verify": True,
        },
        "dtype": "bfloat16",
        "revision": "v1",
        "local_files_only": True,
    }


def test_demo_exits_with_0_or_1_by_the_bits(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    arguments = ["demo", "--size", "tiny", "--device", "cpu", "--json", str(out)]
    assert cli.main(arguments) == 0
    content = json.loads(out.read_text())
    assert content["bit_equal"]
    assert content["command"] == ["wsm", *arguments]
    monkeypatch.setattr(demo._Outcome, "differences", lambda ours, theirs: ["prefill logits"])
    assert cli.main(arguments) == 1
    assert "different bits" in capsys.readouterr().out


# -- wsm plan --------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """A machine on which the disk limits, and how often it was measured."""
    counts = {"link": 0, "disk": 0, "layer": 0}

    def link(device):
        counts["link"] += 1
        return measure.Link(10e9, 1e-6)

    def disk(spans, direct):
        counts["disk"] += 1
        return measure.Disk(1e6)

    def layer(module, device, batch, tokens):
        counts["layer"] += 1
        return measure.Compute(0.001 * tokens, {"lm_head": 0.002}, 0.0, tokens)

    monkeypatch.setattr(measure, "measure_link", link)
    monkeypatch.setattr(measure, "measure_disk", disk)
    monkeypatch.setattr(measure, "measure_layer", layer)
    monkeypatch.setattr(
        measure, "find_spans", lambda paths, direct: [measure.Span(paths[0], 0, False)]
    )
    monkeypatch.setenv("COLUMNS", "80")
    return counts


def plan_of(folder, tmp_path, *changes):
    out = tmp_path / "plan.json"
    arguments = ["plan", str(folder), *BUDGETS, "--batch", "2", "--tokens", "5", *changes]
    assert cli.main([*arguments, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_plan_says_what_it_would_do_and_loads_nothing(
    folder, tmp_path, measured, monkeypatch, capsys
):
    monkeypatch.setattr(_engine, "Engine", None)
    monkeypatch.setenv("WSM_AGGRESSIVE_GPU_PREFETCH", "1")
    monkeypatch.setenv("WSM_VERIFY", "sums.json")
    content = plan_of(folder, tmp_path, "--reader", "pread")
    assert measured == {"link": 1, "disk": 1, "layer": 2}  # prefill and decode
    values = {name: (entry["value"], entry["source"]) for name, entry in content["values"].items()}
    assert values["device memory"] == (2 << 20, "argument")
    assert values["host memory"] == (1 << 20, "argument")
    assert values["units"][1] == "planner"
    assert values["lookahead_units"] == (1, "variable")
    assert values["reader"] == ("pread", "argument")
    assert values["verify"] == ("sums.json", "variable")
    assert values["staging_mb"][1] == values["chunk_mb"][1] == "planner"
    homes = [content["plan"][f"{home}_home_bytes"] for home in ("device", "host", "disk")]
    assert sum(homes) == content["plan"]["model_bytes"]
    assert content["workload"] == {"batch": 2, "tokens": 5}
    assert content["rates"]["disk"]["source"] == "measured"
    assert content["rates"]["compute"]["layer_s"] == 0.005
    assert content["rates"]["decode_compute"]["layer_s"] == 0.001
    prefill = content["prefill"]
    assert prefill["limit"] == "disk"
    assert prefill["disk_seconds"] == pytest.approx(homes[2] / 1e6, rel=0.01)
    assert prefill["compute_seconds"] == pytest.approx(12 * 0.005 + 0.002)
    assert prefill["tokens_per_s"] == pytest.approx(10 / prefill["seconds"])
    assert content["decode"]["tokens_per_s"] == pytest.approx(2 / content["decode"]["seconds"])
    assert prefill["gain_device_per_gib"] > prefill["gain_host_per_gib"] > 0
    printed = capsys.readouterr().out
    for part in (
        "limited by the disk",
        "one more GiB of device memory: a pass of ",
        "one more GiB of host memory: a pass of ",
        "prefill of 2 x 5",
        "tokens/s; decode: ",
        "0.00 GB/s",
        "limits",
    ):
        assert part in printed
    assert re.search(r"lookahead_units\s*│\s*1 │ variable", printed)
    assert re.search(r"disk\s*│\s*0.00 GB/s │ measured", printed)
    assert max(len(line) for line in printed.replace(str(folder), "").splitlines()) <= 80


def test_plan_takes_what_was_measured_before(folder, tmp_path, measured):
    plan_of(folder, tmp_path)
    content = plan_of(folder, tmp_path)
    assert measured == {"link": 1, "disk": 1, "layer": 2}
    assert {content["rates"][name]["source"] for name in ("disk", "h2d", "compute")} == {"cached"}


@pytest.mark.parametrize("how", ["option", "variable"])
def test_plan_without_measuring_assumes(folder, tmp_path, measured, monkeypatch, capsys, how):
    if how == "variable":
        monkeypatch.setenv("WSM_MEASURE", "0")
    content = plan_of(folder, tmp_path, *(["--no-measure"] if how == "option" else []))
    assert measured == {"link": 0, "disk": 0, "layer": 0}
    assert content["rates"]["disk"]["source"] == content["rates"]["h2d"]["source"] == "default"
    assert content["prefill"]["compute_seconds"] is None
    assert content["values"]["measure"]["source"] == ("argument" if how == "option" else "variable")
    printed = capsys.readouterr().out
    assert "at least: computing is not known" in printed
    assert "at most" in printed


def test_plan_of_what_fits_says_so(folder, tmp_path, measured, capsys):
    content = plan_of(folder, tmp_path, "--device-memory", "64MiB")
    assert "everything fits on the device: nothing streams" in capsys.readouterr().out
    prefill = content["prefill"]
    assert (prefill["limit"], prefill["h2d_bytes"]) == ("compute", 0)
    assert prefill["seconds"] == pytest.approx(12 * 0.005 + 0.002)


def test_plan_warns_and_refuses_as_streaming_does(folder, tmp_path, measured, monkeypatch, capsys):
    monkeypatch.setenv("WSM_STAGING_MBS", "4")
    assert plan_of(folder, tmp_path)["plan"]["warnings"]
    assert "warning: WSM_STAGING_MBS" in capsys.readouterr().out
    error = failure(["plan", str(folder), *BUDGETS, "--host-memory", "1KiB"], capsys)
    assert "too small" in error


def test_plan_is_plain_where_the_terminal_is(folder, tmp_path, measured, monkeypatch):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(plan, "Console", lambda: Console(file=plain, width=80))
    plan_of(folder, tmp_path)
    plain.flush()
    assert b"####" in plain.buffer.getvalue()


def test_prefill_shows_what_was_predicted_beside_what_it_took(folder, tmp_path, measured, capsys):
    out = tmp_path / "out.json"
    asked = ["--tokens", "5", "--repeat", "3", "--json", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSM_MEASURE", "1")
        assert cli.main(["prefill", str(folder), *BUDGETS, *asked]) == 0
    printed = capsys.readouterr().out
    assert "predicted and achieved" in printed
    assert "2 passes" in printed
    content = json.loads(out.read_text())
    assert content["predicted"]["limit"] == "disk"
    assert content["achieved"]["passes"] == 2

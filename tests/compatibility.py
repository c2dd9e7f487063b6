"""Runs the table of families and writes docs/compatibility.md from what came out.

    python tests/compatibility.py [--device cuda]

Prints the line of this run, and exits with 1 where anything failed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from families import Family
from family_table import FAMILIES
from refusals import REFUSALS

from wsm_ext import _engine

DOCUMENT = Path(__file__).parent.parent / "docs" / "compatibility.md"
_STRATEGIES = ("static cache", "offloaded cache", "beam search", "assisted")

Outcomes = Mapping[tuple[str, str], str]


def families_table(outcomes: Outcomes | None = None) -> str:
    """One line for each family. Without outcomes: as if all had passed."""
    lines = ["| family | class | units | generate | file as asked |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        cells = [_cell(family, some, outcomes) for some in _columns(family)]
        lines.append(f"| {family.name} | `{family.model}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _columns(family: Family) -> Iterable[list[tuple[str, str]]]:
    """By column, the cases and what the table calls them."""
    cases = family.cases
    yield [(c, "auto" if c == "outputs" else c.removeprefix("units ")) for c in cases
           if c == "outputs" or c.startswith("units ")]  # fmt: skip
    yield [(c, "greedy" if c == "generate" else c) for c in cases
           if c in ("generate", *_STRATEGIES)]  # fmt: skip
    yield [(c, c) for c in cases if " as " in c]


def _cell(family: Family, cases: list[tuple[str, str]], outcomes: Outcomes | None) -> str:
    def shown(case: str, label: str) -> str:
        failed = outcomes is not None and outcomes.get((family.name, case)) == "failed"
        return f"**{label} fails**" if failed else label

    return ", ".join(shown(case, label) for case, label in cases) or "-"


def refusals_table() -> str:
    lines = ["| refused | what to do instead |", "|---|---|"]
    return "\n".join(lines + [f"| {refusal.what} | {refusal.instead} |" for refusal in REFUSALS])


def run_line(device: str, outcomes: Outcomes) -> str:
    """The line of the table of runs."""
    name = "CPU (host device)" if device == "cpu" else torch.cuda.get_device_name()
    count = Counter(outcomes.values())
    return (
        f"| {name} | {torch.__version__} | {transformers.__version__} | {count['passed']} |"
        f" {count['failed']} | {count['skipped']} |"
    )


def replace_part(text: str, part: str, content: str) -> str:
    """The document with what stands between the marks of `part` replaced."""
    marks = re.compile(rf"(<!-- {part} -->\n).*?(<!-- end of {part} -->)", re.DOTALL)
    changed, count = marks.subn(lambda found: f"{found[1]}{content}\n{found[2]}", text)
    assert count == 1, f"{DOCUMENT} has {count} parts {part!r}"
    return changed


def part_of(text: str, part: str) -> str:
    return text.split(f"<!-- {part} -->\n")[1].split(f"\n<!-- end of {part} -->")[0]


class Recorder:
    """A plugin of pytest that keeps the outcome of each family's cases."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], str] = {}
        self._cases: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            given = getattr(item, "callspec", None)
            if given is not None and "family" in given.params:
                self._cases[item.nodeid] = (given.params["family"].name, given.params["case"])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        case = self._cases.get(report.nodeid)
        if case is not None and (report.when == "call" or report.outcome != "passed"):
            self.outcomes[case] = report.outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    if device == "cuda" and not (torch.cuda.is_available() and _engine.built_with_cuda):
        sys.exit("--device cuda: there is no CUDA device, or wsm_ext was built without CUDA")
    recorder = Recorder()
    here = Path(__file__).parent / "test_families.py"
    which = "gpu" if device == "cuda" else "not gpu"
    code = pytest.main(["-q", "-m", which, "-k", "streamed_bits", str(here)], plugins=[recorder])
    line = run_line(device, recorder.outcomes)
    text = DOCUMENT.read_text("utf-8")
    text = replace_part(text, "families", families_table(recorder.outcomes))
    text = replace_part(text, "refusals", refusals_table())
    first = line.split(" | ")[0]
    runs = [run for run in part_of(text, "runs").splitlines() if not run.startswith(f"{first} |")]
    text = replace_part(text, "runs", "\n".join([*runs, line]))
    DOCUMENT.write_text(text, "utf-8")
    print(line)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())

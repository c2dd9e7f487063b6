"""What the documentation names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("**/*.md")]
)


def cpp_tests() -> set[str]:
    found = set()
    for file in (ROOT / "tests" / "cpp").glob("*_test.cc"):
        for suite, name in re.findall(r"^TEST(?:_P|_F)?\((\w+),\s*(\w+)\)", file.read_text(), re.M):
            found.add(f"{suite}.{name}")
    return found


def test_every_test_that_reliability_names_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(\w+\.py)::(\w+)`", text)
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
    suites = set(re.findall(r"`([A-Z]\w+\.[A-Z]\w+)`", text))
    assert len(suites) > 15
    assert suites <= cpp_tests()


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(doc: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", doc.read_text()):
        assert (doc.parent / target).exists(), f"{doc.name} links to {target}"

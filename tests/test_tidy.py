"""The conventions that a program can check: who may include or import whom, functions that fit a
screen, messages and targets that the documentation names, words, commits."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "wsm_ext"


def files(*patterns: str) -> list[Path]:
    found = sorted(file for pattern in patterns for file in ROOT.glob(pattern))
    assert found, patterns
    return found


def shown(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


# -- who includes whom: docs/architecture.md -------------------------------------------------------

# Of each folder of csrc the folders, and the single headers, that it may include beside its own.
INCLUDES = {
    "util": set(),
    "plan": {"util"},
    "storage": {"util"},
    "device": {"util"},
    "memory": {"util", "device/device.h", "plan/plan.h", "plan/kept_cache.h"},
    "engine": {"util", "plan", "storage", "device", "memory"},
    "seam": {"util"},
    "bindings": {"util", "plan", "storage", "device", "memory", "engine", "seam"},
}


def wrong_includes(file: str, text: str) -> list[str]:
    folder = file.split("/")[1]
    allowed = INCLUDES[folder] | {folder}
    wrong = []
    for header in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE):
        if header not in allowed and header.split("/")[0] not in allowed:
            wrong.append(f"{file} includes {header}")
    return wrong


def test_folders_of_csrc_include_only_what_they_may() -> None:
    found = [
        wrong
        for file in files("csrc/*/*.h", "csrc/*/*.cc")
        for wrong in wrong_includes(shown(file), file.read_text())
    ]
    assert found == []


def test_a_wrong_include_is_found() -> None:
    assert wrong_includes("csrc/plan/x.h", '#include "plan/plan.h"\n#include "engine/y.h"\n') == [
        "csrc/plan/x.h includes engine/y.h"
    ]
    assert wrong_includes("csrc/memory/x.h", '#include "device/cuda_context.h"\n') != []


# -- who imports whom ------------------------------------------------------------------------------

# Each may import those before it. What stands in one row knows nothing of its row.
ROOMS = [
    ["_engine", "sizes", "wording", "atomic_write"],
    ["config"],
    ["checkpoints"],
    ["modules"],
    ["hf"],
    ["planning"],
    ["runtime"],
    ["stream"],
    ["pretrained"],
    ["commands"],
    ["__init__", "__main__"],
]
RANK = {room: rank for rank, row in enumerate(ROOMS) for room in row}


class Import(NamedTuple):
    line: int
    room: str  # that is imported from
    name: str  # that is imported; empty: the room itself


def room_of(module: str) -> str:
    """The room of a dotted path inside the package."""
    return module.split(".")[0] or "__init__"


def imports_of(module: str, text: str) -> Iterator[Import]:
    """What the module (a dotted path inside the package, `__init__` for its root) imports of the
    package, at any place: inside functions and for type checkers too."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "wsm_ext":
                    yield Import(node.lineno, room_of(alias.name.partition(".")[2]), "")
        if isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            elif base[:1] == ["wsm_ext"]:
                base = base[1:]
            else:
                continue
            for alias in node.names:
                room = room_of(".".join(base) or (alias.name if alias.name in RANK else ""))
                inside = bool(base) or alias.name not in RANK
                yield Import(node.lineno, room, alias.name if inside else "")


def private_names_used(text: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """`module._name`, for names of modules that were imported."""
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
            and is_private(node.attr)
        ):
            yield node.lineno, f"{node.value.id}.{node.attr}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_engine"


def wrong_imports(module: str, text: str) -> list[str]:
    own = room_of(module)
    wrong, foreign = [], set()
    for line, room, name in imports_of(module, text):
        if room == own:
            continue
        foreign.add(name or room)
        if RANK[room] >= RANK[own]:
            wrong.append(f"{module}:{line} imports {room}, which comes after {own}")
        if is_private(name):
            wrong.append(f"{module}:{line} imports {name}, a private name of {room}")
    for line, name in private_names_used(text, foreign):
        wrong.append(f"{module}:{line} uses {name}, a private name of another room")
    return wrong


def test_rooms_import_only_what_comes_before_them() -> None:
    found = []
    for file in files("wsm_ext/**/*.py"):
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        assert room_of(module) in RANK, f"{shown(file)} stands in no row of ROOMS"
        found += wrong_imports(module, file.read_text())
    assert found == []


@pytest.mark.parametrize(
    ("module", "line", "why"),
    [
        ("planning.plan", "from ..runtime import trace", "imports runtime, which comes after"),
        ("planning.plan", "from wsm_ext.stream import f", "imports stream, which comes after"),
        ("planning.plan", "import wsm_ext.commands.cli", "imports commands, which comes after"),
        ("planning.plan", "from .. import stream", "imports stream, which comes after"),
        ("planning.plan", "from .. import __version__", "imports __init__, which comes after"),
        (
            "planning.plan",
            "def f():\n  from ..stream import g",
            "imports stream, which comes after",
        ),
        ("sizes", "from . import wording", "imports wording, which comes after"),
        ("stream", "from .planning.rates import _x", "imports _x, a private name of planning"),
        ("stream", "from .planning import rates\nrates._x", "uses rates._x, a private name"),
        ("stream", "from .planning import rates\nfrom . import _engine\n_engine.x\nrates.x", ""),
        ("planning.plan", "from .rates import _x", ""),
    ],
)
def test_a_wrong_import_is_found(module: str, line: str, why: str) -> None:
    found = wrong_imports(module, line)
    assert len(found) == bool(why)
    assert why in "".join(found)


# -- functions that fit a screen -------------------------------------------------------------------

MOST_LINES = 60
# Beside a longer one stands why: a comment above it, or in it, that begins with this word.
REASON = re.compile(r"^\s*(#|//) Long: \w", re.MULTILINE)


class Function(NamedTuple):
    line: int
    name: str
    text: str  # with the comment above it


def python_functions(text: str) -> Iterator[Function]:
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield function(lines, node.lineno - 1, node.end_lineno - 1, node.name)


def cpp_functions(text: str) -> Iterator[Function]:
    """As clang-format lays them out: what begins at an indent of 0, or of 2 in a class, and goes on
    to a brace of the same indent."""
    lines = text.splitlines()
    code = [re.sub(r"//.*", "", line).rstrip() for line in lines]
    for pad in ("", "  "):
        begin = None
        for index, line in enumerate(code):
            outer = re.match(
                pad + r"(namespace|class|struct|enum|union|public|private|protected)\b", line
            )
            if outer or line == pad + 'extern "C" {':
                begin = None
            elif re.match(pad + r"[A-Za-z~]", line):
                begin = index if begin is None else begin
            if begin is not None and line.startswith(pad + "}"):
                yield function(lines, begin, index, lines[begin].strip())
                begin = None
            elif line.endswith(";") and re.match(pad + r"\S", line):
                begin = None


def function(lines: list[str], begin: int, end: int, name: str) -> Function:
    above = list(takewhile(lambda line: re.match(r"\s*(#|//)", line), reversed(lines[:begin])))
    return Function(begin + 1, name, "\n".join(above + lines[begin : end + 1]))


def too_long(found: Function) -> bool:
    code = [line for line in found.text.splitlines() if not re.match(r"\s*(#|//)", line)]
    return len(code) > MOST_LINES and not REASON.search(found.text)


def test_functions_fit_a_screen_or_say_why_not() -> None:
    found = []
    for pattern in ("wsm_ext/**/*.py", "bench/**/*.py", "tests/*.py", "examples/*.py"):
        for file in files(pattern):
            found += [(shown(file), each) for each in python_functions(file.read_text())]
    for pattern in ("csrc/*/*.h", "csrc/*/*.cc", "bench/*.c[cu]", "tests/*/*.cc", "tests/cpp/*/*"):
        for file in files(pattern):
            found += [(shown(file), each) for each in cpp_functions(file.read_text())]
    assert len(found) > 2000
    assert [f"{file}:{each.line} {each.name}" for file, each in found if too_long(each)] == []


def test_a_long_function_is_found() -> None:
    body = "  a();\n" * MOST_LINES
    member = body.replace("  a", "    a")
    for text in (
        f"void f() {{\n{body}}}\n",
        f"class A {{\n  int f(\n      int a) {{\n{member}  }}\n}};\n",
    ):
        (found,) = (each for each in cpp_functions(text) if too_long(each))
        assert "f(" in found.name
    (found,) = python_functions("def f():\n" + body.replace(";", ""))
    assert too_long(found)
    (found,) = python_functions("# Long: a table.\ndef f():\n" + body.replace(";", ""))
    assert not too_long(found)


# -- messages --------------------------------------------------------------------------------------


@functools.cache
def texts() -> str:
    """All texts of the code."""
    found = [text for file in files("wsm_ext/**/*.py") for text in python_texts(file.read_text())]
    for file in files("csrc/*/*.h", "csrc/*/*.cc"):
        # A text may go on in the next line.
        code = re.sub(r'"\s*\n\s*"', "", file.read_text())
        found += re.findall(r'"((?:[^"\\\n]|\\.)*)"', code)
    return "\0".join(found)


def python_texts(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def fragments(quoted: str) -> list[str]:
    """What of a quoted message stands in the code in one piece: between what is filled in."""
    quoted = quoted.removeprefix("[WSM]")  # the log puts it before each line
    parts = re.split(r"\.\.\.|'|[:=]|\b[A-Z]{4}\b|\d+", quoted)
    return [part.strip() for part in parts if re.search(r"[a-z]{3}", part)]


def quoted_messages(page: str) -> list[str]:
    """Those of the page's table of messages, but for those of others, and its lines of the log."""
    table = page.split("\n## Messages\n")[1].split("\n## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    ours = [re.sub(r"`[^`]+` \(torch\)", "", cell) for cell in cells]
    found = [quoted for cell in ours for quoted in re.findall(r"`([^`]+)`", cell)]
    return found + re.findall(r"`(\[WSM\] [^`]+)`", page)


def is_said(quoted: str) -> bool:
    return all(part in texts() for part in fragments(quoted))


def test_every_message_that_troubleshooting_quotes_is_one_of_the_code() -> None:
    quoted = quoted_messages((ROOT / "docs/troubleshooting.md").read_text())
    assert len(quoted) > 25
    assert all(map(fragments, quoted))
    assert [message for message in quoted if not is_said(message)] == []


def test_a_message_that_nobody_says_is_found() -> None:
    assert is_said("tensor '...' is not as it was recorded")
    assert not is_said("this streamed model belongs to nobody")


# -- CONTRIBUTING ----------------------------------------------------------------------------------


def targets(makefile: str) -> set[str]:
    names = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", makefile, re.MULTILINE)
    assert names
    return set(names[1].replace("\\\n", " ").split()) - {"help"}


def test_every_target_and_document_is_listed() -> None:
    listed = (ROOT / "CONTRIBUTING.md").read_text()
    missing = [
        f"make {name}"
        for name in targets((ROOT / "Makefile").read_text())
        if not re.search(rf"`make {name}[` ]", listed)
    ]
    missing += [shown(page) for page in files("docs/*.md") if f"({shown(page)})" not in listed]
    assert missing == []


# -- words -----------------------------------------------------------------------------------------


TREES = ("csrc", "wsm_ext", "bench", "tests")


def banned_words(glossary: str) -> set[str]:
    rows = glossary.split("\n## Not used as names\n")[1].splitlines()
    return {word for row in rows for word in re.findall(r"`([\w.]+)`", row.split(" | ")[0])}


def identifiers(text: str, comment: str) -> set[str]:
    """Roughly: of code, without its comments and texts."""
    code = re.sub(rf'"(?:[^"\\\n]|\\.)*"|{comment}.*', "", text)
    return set(re.findall(r"[A-Za-z_]\w*", code))


def test_words_that_the_glossary_bans_are_no_names() -> None:
    banned = banned_words((ROOT / "docs/glossary.md").read_text())
    assert len(banned) > 10
    found = []
    for comment, patterns in {"#": ("**/*.py", "**/*.pyi"), "//": ("**/*.h", "**/*.c[cu]")}.items():
        for file in files(*(f"{tree}/{p}" for tree in TREES for p in patterns)):
            names = identifiers(file.read_text(), comment) | {file.name}
            found += [f"{shown(file)}: {word}" for word in names & banned]
    assert found == []


def test_a_banned_word_is_found() -> None:
    banned = banned_words("\n## Not used as names\n| not | but |\n| `Old`, `old.py` | `New` |\n")
    assert banned == {"Old", "old.py"}
    assert identifiers('class Old: # Older\n  "Oldest"', "#") == {"class", "Old"}


# -- commits ---------------------------------------------------------------------------------------

BASE = "4a69cdf"  # those before it followed no rule
MOST_COLUMNS = 72


def wrong_message(message: str) -> list[str]:
    subject, _, rest = message.partition("\n")
    wrong = []
    if len(subject) > MOST_COLUMNS:
        wrong.append(f"the subject has {len(subject)} characters, not at most {MOST_COLUMNS}")
    if ";" in subject:
        wrong.append("the subject has a ';': make it two commits")
    if not rest.startswith("\n") or not rest.strip():
        wrong.append("no blank line and a reason after the subject")
    return [f"{subject!r}: {why}" for why in wrong]


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def test_new_commits_say_what_and_why() -> None:
    if not git("cat-file", "-t", BASE):
        pytest.skip("no git history here")
    log = git("log", "--no-merges", "--format=%B%x00", f"{BASE}..HEAD")
    messages = [message.strip("\n") for message in log.split("\0") if message.strip()]
    assert [wrong for message in messages for wrong in wrong_message(message)] == []


def test_a_wrong_commit_is_found() -> None:
    assert wrong_message("Say what\n\nAnd why.\n") == []
    for message in ("x" * 73 + "\n\nWhy.", "One; two\n\nWhy.", "No reason", "No line\nWhy."):
        assert len(wrong_message(message)) == 1

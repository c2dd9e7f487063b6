"""What is installed and what is shipped, without building anything."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import wsm_ext
from wsm_ext import _engine

ROOT = Path(__file__).resolve().parents[1]


def declared_version() -> str:
    found = re.search(r'^version = "([^"]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found, "pyproject.toml has no version line"
    return found[1]


def test_one_version_everywhere() -> None:
    assert importlib.metadata.version("wsm_ext") == declared_version()
    assert wsm_ext.__version__ == declared_version()
    assert _engine.__version__ == declared_version()


def test_the_command_can_be_loaded() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="wsm")
    assert callable(command.load())


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(wsm_ext.__file__).parent / "py.typed").is_file()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in the source distribution, made where there is no torch, compiler or toolkit.

    Made from a copy, since setuptools leaves a folder where it runs; a copy that has been built in.
    """
    tree = tmp_path_factory.mktemp("sdist") / "tree"
    left_out = (
        ".git",
        ".venv",
        ".whl",
        ".debs",
        "build",
        "dist",
        "results",
        "*.egg-info",
        "*.so",
        "__pycache__",
        ".*_cache",
    )
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*left_out))
    for name in ("wsm_ext/_engine.so", "csrc/plan/planner.o", "build/python/CMakeCache.txt"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"built")
    program = (
        "import sys; sys.modules['torch'] = None; from setuptools import build_meta;"
        "print(build_meta.build_sdist(sys.argv[1]))"
    )
    out = tmp_path_factory.mktemp("dist")
    answer = subprocess.run(
        [sys.executable, "-c", program, str(out)],
        cwd=tree,
        env={"PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    with tarfile.open(out / answer.stdout.splitlines()[-1]) as archive:
        return [name.partition("/")[2] for name in archive.getnames()]


def test_sdist_holds_every_source_that_a_build_needs(sdist: list[str]) -> None:
    needed = [
        *(ROOT / name for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE")),
        *(ROOT / "cmake").glob("*.cmake"),
        *(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cc", ".h")),
        *(ROOT / "wsm_ext").rglob("*.py"),
        ROOT / "wsm_ext" / "py.typed",
    ]
    missing = {str(path.relative_to(ROOT)) for path in needed} - set(sdist)
    assert not missing
    assert len(needed) > 30


def test_sdist_holds_no_build_output(sdist: list[str]) -> None:
    assert not [name for name in sdist if name.endswith((".so", ".pyc", ".o"))]
    assert not [name for name in sdist if name.startswith("build/")]

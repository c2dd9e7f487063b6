"""Builds wsm_ext._engine with CMake and ninja; all else stands in pyproject.toml.

Environment: WSM_CUDA=ON|OFF|AUTO decides whether the CUDA device is built; WSM_BUILD_DIR names a
build folder for CMake that is kept between builds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """The program of the Python package where there is one, else the one on PATH."""
    try:
        folder = __import__(name)
        found = shutil.which(name, path=getattr(folder, "CMAKE_BIN_DIR", None) or folder.BIN_DIR)
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(name)
    if not found:
        raise SystemExit(f"wsm_ext: {name} is needed to build: pip install {name}")
    return found


class BuildEngine(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        kept = os.environ.get("WSM_BUILD_DIR")
        build = Path(kept if kept else Path(self.build_temp, "cmake")).resolve()
        # The cache may name tools of an isolated build environment that is gone; objects stay good.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = tool("cmake")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DWSM_CUDA={os.environ.get('WSM_CUDA') or 'AUTO'}",
        ]
        jobs = str(os.cpu_count() or 1)
        for command in (
            configure,
            [cmake, "--build", str(build), "--target", "_engine", "--parallel", jobs],
            [cmake, "--install", str(build), "--component", "python", "--prefix", str(target)],
        ):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise SystemExit(
                    f"wsm_ext: {command[1]} step of the build failed; its messages are above"
                    " (pip shows them with -v)"
                ) from error
        print((build / "wsm_summary.txt").read_text().strip(), flush=True)


setup(
    ext_modules=[Extension("wsm_ext._engine", sources=[])],
    cmdclass={"build_ext": BuildEngine},
)

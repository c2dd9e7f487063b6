#!/usr/bin/env bash
# Gets a Debian or Ubuntu machine ready: the system packages that are missing (as root, or by sudo, only
# then), and a virtual environment in .venv with what requirements-dev.txt names. Run again, it does only
# what is left to do. PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "setup: $*" >&2
  exit 1
}

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    fail "this needs root, and there is no sudo; run as root: $*"
  fi
}

python=${PYTHON:-python3}
python_has() { "$python" -c "$1" 2>/dev/null; }
has_venv() { python_has 'import ensurepip, venv'; }
has_headers() { python_has 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'; }

missing_packages() {
  command -v g++ >/dev/null || echo g++
  command -v make >/dev/null || echo make
  command -v git >/dev/null || echo git
  command -v pkg-config >/dev/null || echo pkg-config
  [ -e /usr/include/liburing.h ] || echo liburing-dev
  [ -e /usr/include/gtest/gtest.h ] || echo libgtest-dev
  command -v "$python" >/dev/null || echo python3
  has_venv || echo python3-venv
  has_headers || echo python3-dev
}

install_packages() {
  local wanted
  wanted=$(missing_packages | tr '\n' ' ')
  [ -n "$wanted" ] || return 0
  command -v apt-get >/dev/null || fail "install these by your system's package manager first: $wanted"
  echo "setup: installing $wanted"
  as_root apt-get update -qq
  # shellcheck disable=SC2086  # one word a package
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $wanted
  wanted=$(missing_packages | tr '\n' ' ')
  [ -z "$wanted" ] || fail "still missing after apt-get install: $wanted (is $(command -v "$python") the system's?)"
}

# The CUDA device needs the runtime's headers and archive, not the compiler. Without a toolkit they come as
# Python packages, in the versions that go with torch's own.
install_cuda_runtime() {
  [ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || return 0
  ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ] || return 0
  .venv/bin/python -c 'import sys, torch; sys.exit(not (torch.version.cuda or "").startswith("13"))' ||
    return 0
  .venv/bin/python -m pip install -q 'cuda-toolkit[cudart,crt]==13.*'
}

[ "$python" = python3 ] || { has_venv && has_headers; } ||
  fail "PYTHON=$python is not there, or lacks the module venv or its headers (Python.h)"
install_packages
python_has 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "Python 3.10 or newer is needed, and $python is $("$python" -V 2>&1); name another by PYTHON="
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-dev-nodeps.txt
install_cuda_runtime
echo "setup: .venv is ready"

#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU; needs no network.
#
#   bench/gpu_check.sh [STEP...]
#
#   build tests ram disk   what is done without any step named
#   surroundings           tests of what the machine around allows: limits, readers, the page cache
#   memcheck               those that stress the data path, under compute-sanitizer
#   budgets                the time of a pass by the share of the model in RAM, 7 minutes
#   cases cases-disk       the twelve cases of bench/forward.py, 5 minutes each
#   peers peers-disk       the same forwards by other projects, 7 and 5 minutes
#
# A step that fails, or runs past its limit, does not stop the others. Ends with a table of steps; the
# status is 1 when one failed. Logs and results go to $OUT (./out): check.log, summary.txt, *.json.
#
# Packages that the machine lacks may lie in the repository's root: wheels in .whl/, Debian packages
# (liburing-dev, libgtest-dev, pkgconf) in .debs/. They are unpacked to $WORK, never into the system.
# Wheels of the peers (bench/README.md) in .whl-peers/.
#
# Environment: OUT; WORK (builds, kept between runs); LAYERS (12) and RAM_FOLDER (tmpfs) for what runs from
# RAM; DISK_LAYERS (4) and DISK_FOLDER for what runs from disk; CASES, DISK_CASES, PEERS, DISK_PEERS: which;
# KEEP=1 keeps the checkpoints; TESTS: pytest's -k for memcheck; MEMCHECK_LIMIT: seconds.
set -uo pipefail
shopt -s nullglob
root=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-$PWD/out}
WORK=${WORK:-${TMPDIR:-/tmp}/wsm-gpu-check}
LAYERS=${LAYERS:-12} DISK_LAYERS=${DISK_LAYERS:-4}
RAM_FOLDER=${RAM_FOLDER:-/dev/shm/wsm-llama-$LAYERS}
DISK_FOLDER=${DISK_FOLDER:-$WORK/llama-$DISK_LAYERS}
mkdir -p "$OUT" "$WORK"
OUT=$(cd "$OUT" && pwd) WORK=$(cd "$WORK" && pwd)
log=$OUT/check.log
native=$WORK/native
: >"$log"
table=() failed=0
[ -d /usr/local/cuda/bin ] && PATH=$PATH:/usr/local/cuda/bin
export PYTHONUNBUFFERED=1 WSM_REQUIRE_GPU=1
# As after any installation: where there is no bytecode, and none may be written beside the packages,
# every process would compile half of torch and transformers first.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=$WORK/bytecode

unpack_wheels() {
  local wheels=("$root"/.whl/*.whl "$root"/.whl-peers/*.whl)
  [ ${#wheels[@]} -gt 0 ] || return 0
  python3 -m pip install -q --no-index --no-deps --upgrade --target "$WORK/site" "${wheels[@]}"
  export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
}

unpack_debs() {
  [ -d "$root/.debs" ] || return 0
  local deb prefix=$WORK/debs
  for deb in "$root"/.debs/*.deb; do dpkg -x "$deb" "$prefix"; done
  local library
  library=$(dirname "$(find "$prefix/usr/lib" -name 'lib*.a' -print -quit)")
  sed -i "s|^prefix=/usr|prefix=$prefix/usr|; s|=/usr/|=$prefix/usr/|" "$library"/pkgconfig/*.pc
  export PKG_CONFIG_PATH=$library/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}
  export CMAKE_PREFIX_PATH=$prefix/usr
  export LD_LIBRARY_PATH=$library${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  PATH=$PATH:$prefix/usr/bin
}

# step NAME LIMIT_S quiet|shown COMMAND...   quiet: the output goes to the log, and its end is shown on failure
step() {
  local name=$1 limit=$2 show=$3 begin=$SECONDS status
  shift 3
  printf '\n### %s: %s\n' "$name" "$*" >>"$log"
  local from
  from=$(wc -l <"$log")
  if [ "$show" = shown ]; then
    timeout -k 15 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
  else
    timeout -k 15 "$limit" "$@" >>"$log" 2>&1
    status=$?
    [ "$status" = 0 ] || tail -n "+$((from + 1))" "$log" | tail -n 40
  fi
  local verdict=ok
  [ "$status" = 0 ] || { verdict="FAILED ($status)" failed=1; }
  [ "$status" = 124 ] && verdict="OVER $limit s"
  table+=("$(printf '%-22s %-14s %4d s' "$name" "$verdict" $((SECONDS - begin)))")
  echo "--- ${table[-1]}"
}

skip() {
  table+=("$(printf '%-22s skipped: %s' "$1" "$2")")
  echo "--- ${table[-1]}"
}

have_gtest() {
  [ -e /usr/include/gtest/gtest.h ] || [ -e "$WORK/debs/usr/include/gtest/gtest.h" ]
}

do_build() {
  export WSM_BUILD_DIR=$WORK/module WSM_CUDA=ON
  step "build module" 240 quiet \
    python3 -m pip install --no-build-isolation --no-deps --force-reinstall -v "$root"
  local tests=OFF
  have_gtest && tests=ON
  step "configure native" 60 quiet cmake -S "$root" -B "$native" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DWSM_CUDA=ON -DWSM_BUILD_PYTHON=OFF -DWSM_BUILD_BENCH=ON -DWSM_BUILD_TESTS=$tests
  step "build native" 240 quiet cmake --build "$native"
  cat "$native/wsm_summary.txt" 2>/dev/null
}

# From outside the repository, so that the installed package is what is tested.
do_tests() {
  cd "$WORK" || return
  step "pytest -m gpu" 420 shown python3 -m pytest -q -m gpu -p no:cacheprovider "$root/tests"
  cd "$root" || return
  if have_gtest; then
    step "C++ tests" 120 quiet ctest --test-dir "$native" --output-on-failure -j 8
  else
    skip "C++ tests" "no GoogleTest on this machine"
  fi
}

# What a machine allows differs: control groups, file systems, io_uring.
do_surroundings() {
  cd "$WORK" || return
  step "surroundings" 180 shown python3 -m pytest -q -rs -p no:cacheprovider \
    "$root/tests/test_limits.py" "$root/tests/test_reader_ladder.py" "$root/tests/test_page_cache.py"
  cd "$root" || return
}

do_ram() {
  step "bench_h2d" 60 shown "$native/bench/bench_h2d" --json "$OUT/h2d.json"
  step "bits" 120 shown python3 "$root/bench/forward.py" --case bits --preset tiny --layers 6 \
    --folder "$WORK/tiny" --json "$OUT/bits.json"
  step "forward from RAM" 240 shown python3 "$root/bench/forward.py" --case resident,ram --preset 70b \
    --layers "$LAYERS" --folder "$RAM_FOLDER" --json "$OUT/ram.json"
  [ "${KEEP:-0}" = 1 ] || rm -rf "$RAM_FOLDER"
}

do_disk() {
  step "forward from disk" 300 shown python3 "$root/bench/forward.py" --case disk --preset 70b \
    --layers "$DISK_LAYERS" --folder "$DISK_FOLDER" --bench-read "$native/bench/bench_read" \
    --json "$OUT/disk.json"
  local shard
  shard=$(find "$DISK_FOLDER" -name '*.safetensors' -size +1G -print -quit 2>/dev/null)
  step "bench_read" 120 shown "$native/bench/bench_read" "${shard:-$DISK_FOLDER}" --json "$OUT/read.json"
  [ "${KEEP:-0}" = 1 ] || rm -rf "$DISK_FOLDER"
  step "peak RSS" 180 shown python3 "$root/bench/rss.py" --folder "$WORK/rss" --json "$OUT/rss.json"
  [ "${KEEP:-0}" = 1 ] || rm -rf "$WORK/rss"
}

do_cases() {
  step "cases from RAM" 480 shown python3 "$root/bench/forward.py" \
    --case "${CASES:-8,1,7,11,2,12,9,3,10}" --preset 70b --layers "$LAYERS" --folder "$RAM_FOLDER" \
    --bench-read "$native/bench/bench_read" --json "$OUT/cases.json"
  [ "${KEEP:-0}" = 1 ] || rm -rf "$RAM_FOLDER"
}

do_cases_disk() {
  step "cases from disk" 480 shown python3 "$root/bench/forward.py" --case "${DISK_CASES:-4,5,6}" \
    --preset 70b --layers "$DISK_LAYERS" --folder "$DISK_FOLDER" \
    --bench-read "$native/bench/bench_read" --json "$OUT/cases-disk.json"
  [ "${KEEP:-0}" = 1 ] || rm -rf "$DISK_FOLDER"
}

# The time of a pass by the share of the model in RAM.
do_budgets() {
  step "budgets" 420 shown python3 "$root/bench/budgets.py" --folder "$DISK_FOLDER" --layers "$DISK_LAYERS" \
    --bench-read "$native/bench/bench_read" --bytes-per-cell $((512 << 20)) --json "$OUT/budgets.json"
  [ "${KEEP:-0}" = 1 ] || rm -rf "$DISK_FOLDER"
}

# peers NAME LIST LAYERS FOLDER
peers() {
  step "$1" 560 shown python3 "$root/bench/peers.py" --peers "$2" --preset 70b --layers "$3" \
    --folder "$4" --disk-folder "$WORK/peers" --json "$OUT/$1.json"
  [ "${KEEP:-0}" = 1 ] || rm -rf "$4"
}

do_peers() {
  local list="wsm 16 GiB,wsm arena,two buffers,diffusers leaf,diffusers block,resident,mmgp"
  peers peers "${PEERS:-$list,accelerate cpu,deepspeed zero3}" "$LAYERS" "$RAM_FOLDER"
}

do_peers_disk() {
  peers peers-disk "${DISK_PEERS:-wsm disk,accelerate disk,diffusers disk,airllm}" "$DISK_LAYERS" \
    "$DISK_FOLDER"
}

# Torch's caching allocator would hide overruns between its blocks. Calls that CUDA refuses are no
# errors here: the tests provoke them.
do_memcheck() {
  cd "$WORK" || return
  local check=(compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9)
  if have_gtest; then
    step "memcheck C++" 120 shown "${check[@]}" \
      "$native/tests/cpp/wsm_tests" --gtest_brief=1 --gtest_filter='Cuda*'
  fi
  step "memcheck pytest" "${MEMCHECK_LIMIT:-400}" shown env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "${check[@]}" python3 -m pytest -q -m gpu -p no:cacheprovider -o timeout=500 \
    -k "${TESTS:-(test_stream or test_orders or test_resize or test_scarce_gpu) and not auto_budgets}" "$root/tests"
  cd "$root" || return
}

[ $# -gt 0 ] || set -- build tests ram disk
for name in "$@"; do
  case $name in
    build | tests | surroundings | ram | disk | memcheck | budgets | cases | cases-disk | peers | peers-disk) ;;
    *)
      echo "gpu_check: no step '$name'; its first lines list them" >&2
      exit 2
      ;;
  esac
done
cd "$root" || exit
unpack_wheels
unpack_debs
for name in "$@"; do "do_${name//-/_}"; done

{
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  printf '%s\n' "${table[@]}"
  echo "total ${SECONDS} s"
} 2>&1 | tee "$OUT/summary.txt"
exit "$failed"

#!/usr/bin/env bash
# The first minutes on a GPU: steps that end within nine minutes each, to be run together or one at a time.
#
#     bash benchmarks/gpu_session.sh all|STEP... [--dry-run]          # make gpu runs all
#
#     1  versions, memory and product ceilings, the build for this GPU, `env --require cuda`, every op in three types
#        against float64, then the tests of ops in parallel
#     2  every kernel under compute-sanitizer's memcheck, CUDA kernels under racecheck and synccheck, tensors of more than
#        2^31 elements
#     3  ops against their peers: called, and replayed as graphs with a cold L2 cache, as two columns
#     4  Swin-T and As-ViT-S against their source, SDPA and torch.compile: inference, training, training with phases
#     5  the tests of networks and trainings, scores of networks, a search of 20 steps
#     6  asvit-fast tune on the rows that matter
#
# It needs the source tree, Python with torch and Triton, and no network; nothing is installed but what ASVIT_FAST_WHEELS
# has. What is missing is said, and everything else is done. A step ends with a table and `STEP n: passed|failed, seconds`;
# the exit code is 1 if any has failed. With --dry-run, on a machine without a GPU, the same programs run on the CPU with
# sizes that take seconds.
#
# Results, at most eight files a step: OUT (default build/gpu): machine.json, parts.csv, a log of each step, tables of
# rows, which can go to benchmarks/results/GPU/ as they are. Environment:
#
#     PYTHON             interpreter (python3)
#     OUT                folder of the results
#     PROCESSES          of tests, compilations and sanitizers at a time (processors, at most 16)
#     ASVIT_FAST_WHEELS  folder of wheels, which packages that are missing are installed from
#     CUDA_HOME          toolkit (/usr/local/cuda)

set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
PROCESSES=${PROCESSES:-$(n=$(env -u OMP_NUM_THREADS nproc); echo $((n > 16 ? 16 : n)))}
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
STEP_SECONDS=525  # of a step's parts together: the step ends below nine minutes
NEEDED="torch triton numpy timm torchvision tqdm yaml safetensors PIL lazy_loader setuptools ninja pytest xdist"

usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' benchmarks/gpu_session.sh
    exit 2
}

# --------------------------------------------------------------------------- parts of a step

# part NAME SECONDS COMMAND...: run it, log it, show its end. ENDS_EARLY=1: that the time ran out is no failure.
part() {
    local name=$1 limit=$(($2 * SLOWER)) left=$((STEP_SECONDS * SLOWER - (SECONDS - STEP_START))) start=$SECONDS code verdict lines=8
    shift 2
    printf '\n=== %s: %s\n' "$name" "$*" | tee -a "$LOG" | cut -c1-240
    declare -F "$1" >/dev/null && set -- bash -o pipefail -c '"$@"' bash "$@" # of this script: timeout starts programs
    if ((left < 10)); then
        code=124
        echo "not begun: the step has no time left" | tee "$PART_LOG" >>"$LOG"
    else
        timeout -s INT -k 15 $((limit < left ? limit : left)) "$@" >"$PART_LOG" 2>&1 </dev/null
        code=$?
        cat "$PART_LOG" >>"$LOG"
    fi
    case $code in
        0) verdict=passed ;;
        124 | 137) [[ ${ENDS_EARLY:-0} == 1 ]] && verdict="passed, time ran out" || verdict="failed: time ran out" lines=30 ;;
        *) verdict="failed: exit code $code" lines=40 ;;
    esac
    tail -n $lines "$PART_LOG" | cut -c1-240
    record "$name" "$verdict" $((SECONDS - start))
}

# record NAME VERDICT SECONDS
record() {
    [[ $2 == failed* ]] && FAILED=1
    TABLE+=$(printf '%-28s %-24s %5d s' "$1" "$2" "$3")$'\n'
    [[ -e $OUT/parts.csv ]] || echo "step,part,verdict,seconds,facts" >"$OUT/parts.csv"
    printf '%s,"%s","%s",%s,"%s"\n' "$STEP" "$1" "$2" "$3" "${FACTS//\"/\"\"}" >>"$OUT/parts.csv"
}

# --------------------------------------------------------------------------- the machine

packages() {
    local missing
    missing=$("$PYTHON" -c 'import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' $NEEDED) || return
    if [[ -n $missing && -n ${ASVIT_FAST_WHEELS:-} ]]; then
        # shellcheck disable=SC2086  # one word for each package
        "$PYTHON" -m pip install --no-index --find-links "$ASVIT_FAST_WHEELS" \
            $(sed 's/\bxdist\b/pytest-xdist/; s/\byaml\b/pyyaml/; s/\bPIL\b/pillow/' <<<"$missing") || return
    elif [[ -n $missing ]]; then
        echo "missing: $missing (ASVIT_FAST_WHEELS=FOLDER installs them from wheels)"
        return 1
    fi
    echo "all there: $NEEDED"
}

# The extension beside its sources, for this GPU alone; kernels/ under the name that an installation gives it.
build() {
    [[ -e asvit_fast/kernels ]] || ln -s ../kernels asvit_fast/kernels
    if ((DRY)); then
        ASVIT_FAST_BUILD=cpu "$PYTHON" setup.py --version
    else
        TORCH_CUDA_ARCH_LIST=$("$PYTHON" benchmarks/gpu_machine.py --arch) MAX_JOBS=$PROCESSES ASVIT_FAST_BUILD=cuda \
            "$PYTHON" setup.py -q build_ext --inplace
    fi
}

is_built() {
    "$PYTHON" -c 'import torch
from asvit_fast import _extension, backends
archs = (_extension.build_report() or {}).get("archs", [])
there = _extension.cuda_reason() is None
raise SystemExit(not (there and any(backends.arch_runs_on(a, torch.cuda.get_device_capability()) for a in archs)))' 2>/dev/null
}

facts() {
    "$PYTHON" -W ignore benchmarks/gpu_machine.py --facts 2>/dev/null || echo "no facts: torch or another package cannot be imported"
}

prepare() {
    [[ -e asvit_fast/kernels ]] || ln -s ../kernels asvit_fast/kernels
    FACTS=$(facts)
    part packages 60 packages
    [[ $FACTS != "no facts"* ]] || FACTS=$(facts)
    if ((DRY)) || ! is_built; then part build 240 build; fi
}

# every case of tests/op_cases.py in a process of its own, which also compiles all kernels in parallel
smoke() {
    "$PYTHON" -W ignore tests/op_cases.py --list >"$SCRATCH/cases" || return
    cut -f2 "$SCRATCH/cases" | head -n "$CASES" |
        xargs -d '\n' -P "$PROCESSES" -I '{}' "$PYTHON" -W ignore tests/op_cases.py --device "$DEVICE" --case '{}' |
        grep -v ' wrong$' | sort
}

# sanitize TOOL TYPE CASE: one line; memory is torch's own per tensor, so that every overrun shows
sanitize() {
    local report
    if report=$(PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 $SANITIZER "$PYTHON" -W ignore tests/op_cases.py \
        --device "$DEVICE" --dtype "$2" --case "$3" 2>&1); then
        echo "$1 $2 $3: ok $(grep -m1 'ERROR SUMMARY\|RACECHECK SUMMARY' <<<"$report")"
    else
        echo "$1 $2 $3: WRONG"
        grep -v '^=* *$' <<<"$report" | tail -n 25
        return 1
    fi
}

sanitizers() { # jobs of one tool: sanitizers TOOL BACKENDS TYPE...
    local tool=$1 backends=$2 dtype
    shift 2
    export SANITIZER=""
    if ! ((DRY)); then
        SANITIZER=$(command -v compute-sanitizer || echo "$CUDA_HOME/bin/compute-sanitizer")
        [[ -x $SANITIZER ]] || { echo "compute-sanitizer is neither on PATH nor in $CUDA_HOME/bin"; return 1; }
        SANITIZER+=" --tool $tool --error-exitcode 9 --print-limit 5"
    fi
    "$PYTHON" -W ignore tests/op_cases.py --list >"$SCRATCH/cases" || return
    for dtype in "$@"; do
        grep -E "^($backends)"$'\t' "$SCRATCH/cases" | cut -f2 | head -n "$CASES" | sed "s/^/$tool\n$dtype\n/"
    done | xargs -d '\n' -P "$PROCESSES" -n 3 bash -c 'sanitize "$@"' sanitize | sort
}

run_pytest() { # only if it is there: `packages` has said so otherwise
    OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2 "$PYTHON" -W ignore -m pytest -m gpu -q -p no:cacheprovider "$@"
}

search() {
    local folder=$SCRATCH/search
    "$PYTHON" -m asvit_fast search --out "$folder" --device "$DEVICE" --quiet "$@" || return
    cp "$folder/trace.jsonl" "$OUT/search.jsonl"
    cat "$folder/result.json"
}

# --------------------------------------------------------------------------- the steps

step_1() {
    part "machine" 60 "$PYTHON" benchmarks/gpu_machine.py --device "$DEVICE" --json "$OUT/machine.json"
    if ((DRY)); then
        part "environment" 60 "$PYTHON" -m asvit_fast env --require reference
        part "ops against float64" 120 smoke
        part "tests, collected" 120 run_pytest --collect-only
        ASVIT_FAST_REHEARSE=1 part "tests, rehearsed" 120 run_pytest tests/test_gpu_large.py
    else
        part "environment" 60 "$PYTHON" -m asvit_fast env --require cuda
        part "ops against float64" 150 smoke
        # a process for each processor: most of the time is Triton's compiler
        ASVIT_FAST_REQUIRE_GPU=1 part "tests of ops" 360 run_pytest -n "$PROCESSES" --dist worksteal --durations 12 \
            --ignore tests/test_gpu_large.py --ignore tests/test_gpu_models.py --ignore tests/test_gpu_training.py
    fi
}

step_2() {
    part "kernels, compiled" 180 smoke
    part "memcheck" 300 sanitizers memcheck 'triton|cuda' bfloat16 float32
    part "racecheck" 150 sanitizers racecheck cuda float32
    part "synccheck" 150 sanitizers synccheck cuda float32
    if ((DRY)); then
        ASVIT_FAST_REHEARSE=1 part "large tensors" 60 run_pytest tests/test_gpu_large.py
    else
        ASVIT_FAST_REQUIRE_GPU=1 part "large tensors" 150 run_pytest tests/test_gpu_large.py
    fi
}

step_3() {
    local case cases=(N=49:128 N=196:128 N=144:64 N=784:32 x7x7:2) options=(--device "$DEVICE" --rounds "$ROUNDS" --no-compile)
    ((DRY)) && cases=("one window:1")
    for case in "${cases[@]}"; do # part of the names, images
        part "attention, ${case%:*}" 100 "$PYTHON" benchmarks/bench_window_attention.py "${options[@]}" --dtype bfloat16 \
            --case "${case%:*}" --batch "${case#*:}" --modes forward both --csv "$OUT/ops.csv"
    done
    part "patch merging" 80 "$PYTHON" benchmarks/bench_patch_merge.py "${options[@]}" --dtype bfloat16 \
        --case "$( ((DRY)) && echo 14x14)" --batch "$BATCH" --modes forward both --csv "$OUT/ops.csv"
    part "patch embedding" 80 "$PYTHON" benchmarks/bench_patch_embed.py "${options[@]}" --dtype bfloat16 \
        --case "$( ((DRY)) && echo "x 16, K 4")" --batch "$BATCH" --mode forward both --csv "$OUT/embed.csv"
    part "norms along curves" 60 "$PYTHON" benchmarks/bench_normalization_taylor.py --device "$DEVICE" \
        --rounds "$ROUNDS" $( ((DRY)) && echo --ops tanh) --csv "$OUT/taylor.csv"
    part "GELU along curves" 60 "$PYTHON" benchmarks/bench_gelu_taylor.py "${options[@]}" --csv "$OUT/taylor.csv"
    part "attention along curves" 60 "$PYTHON" benchmarks/bench_window_attention_taylor.py "${options[@]}" \
        --case "$( ((DRY)) && echo "stage 4")" --csv "$OUT/taylor.csv"
    SUMMARY="ops.csv embed.csv taylor.csv"
}

step_4() {
    local name options=(--device "$DEVICE" --batch-sizes "$BATCH" --rounds "$ROUNDS" --amp bf16 --quiet --csv "$OUT/models.csv")
    for name in swin_tiny_patch4_window7_224 asvit_small; do
        part "$name" 170 "$PYTHON" -m asvit_fast bench "${WHAT:-$name}" "${options[@]}" \
            $( ((DRY)) && echo --against source,sdpa || echo --compile --against source,sdpa,compiled)
    done
    part "training with phases" 170 "$PYTHON" benchmarks/bench_training.py --device "$DEVICE" --rounds "$ROUNDS" \
        $( ((DRY)) && echo --tiny --no-compile || echo --models asvit_small --batches 128) --csv "$OUT/training.csv"
    ((DRY)) || part "other libraries" 90 "$PYTHON" benchmarks/bench_families.py --case "transformers Swin-T" \
        "torchvision swin3d_t" --device "$DEVICE" --dtype bf16 --rounds "$ROUNDS" --csv "$OUT/models.csv"
    SUMMARY="models.csv training.csv"
}

step_5() {
    local sizes=() small=()
    if ((DRY)); then
        sizes=(--img-size 32 --batch 2 --repeats 1 --steps 2 --rounds 2 --long-rounds 2)
        small=(--img-size 32 --batch 2 --repeats 1 --thetas 2)
    fi
    if ((DRY)); then
        ASVIT_FAST_REHEARSE=1 part "tests of networks" 60 run_pytest tests/test_gpu_training.py -k arrive_whole
    else
        ASVIT_FAST_REQUIRE_GPU=1 part "tests of networks" 270 run_pytest -n "$PROCESSES" --dist worksteal \
            --durations 12 tests/test_gpu_models.py tests/test_gpu_training.py
    fi
    part "scores" 180 "$PYTHON" benchmarks/bench_scores.py --device "$DEVICE" --without compiled jax \
        --only forward order1 order2 ntk topology search "${sizes[@]}" --csv "$OUT/scores.csv"
    part "score" 60 "$PYTHON" -m asvit_fast score asvit_seed --device "$DEVICE" "${small[@]}"
    part "search" 60 search --steps $((DRY ? 2 : 20)) "${small[@]}"
    SUMMARY="scores.csv"
}

step_6() {
    local options=(--dtypes bf16 --batch 128 $( ((DRY)) && echo --dry-run || echo --quiet))
    export ASVIT_FAST_TILES=$OUT
    # the table keeps every row that is found: time that runs out is the end of the list, not a failure
    ENDS_EARLY=1 part "one tile" 130 "$PYTHON" -m asvit_fast tune --shapes 7x7x32b,7x7x8 "${options[@]}"
    ENDS_EARLY=1 part "embedding, merging" 200 "$PYTHON" -m asvit_fast tune --topology asvit_small \
        --ops patch_embed,patch_merge "${options[@]}"
    ENDS_EARLY=1 part "blocks" 240 "$PYTHON" -m asvit_fast tune --shapes 14x14x22,28x28x22 "${options[@]}"
    unset ASVIT_FAST_TILES
}

run_step() {
    STEP=$1 STEP_START=$SECONDS TABLE="" FAILED=0 SUMMARY="" FACTS=""
    LOG=$OUT/step$1.log PART_LOG=$SCRATCH/part.log
    : >"$LOG"
    printf '\n######## STEP %s\n' "$STEP"
    prepare
    "step_$STEP"
    # shellcheck disable=SC2086  # one word for each file
    [[ -z $SUMMARY ]] || (cd "$OUT" && "$PYTHON" "$OLDPWD/benchmarks/gpu_summary.py" $SUMMARY) | tee -a "$LOG" | cut -c1-190
    printf '\n%s\n%s' "$FACTS" "$TABLE"
    echo "STEP $STEP: $( ((FAILED)) && echo failed || echo passed), $((SECONDS - STEP_START)) seconds"
    ((ALL_FAILED |= FAILED))
}

# --------------------------------------------------------------------------- what is asked for

DRY=0 STEPS=()
for argument in "$@"; do
    case $argument in
        --dry-run) DRY=1 ;;
        all) STEPS=(1 2 3 4 5 6) ;;
        [1-6]) STEPS+=("$argument") ;;
        *) usage ;;
    esac
done
((${#STEPS[@]})) || usage

if ((DRY)); then
    SLOWER=8 # limits of time, on few cores that others use, too
    DEVICE=cpu ROUNDS=2 BATCH=1 CASES=2 PROCESSES=2 WHAT="4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"
else
    SLOWER=1
    DEVICE=cuda ROUNDS=10 BATCH=128 CASES=1000
fi
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
mkdir -p "$OUT"
export PYTHON PROCESSES DEVICE CASES SCRATCH OUT DRY NEEDED CUDA_HOME PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor}
export -f packages build smoke sanitize sanitizers run_pytest search
ALL_FAILED=0
for step in "${STEPS[@]}"; do run_step "$step"; done
exit $ALL_FAILED

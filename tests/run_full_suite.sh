#!/usr/bin/env bash
# Every topology against one process: losses, norms, every gradient and the weights after the last step.
# GPUs are used where there are enough of them, else CPU processes with gloo; MAX_RANKS leaves larger topologies out.
#   THRESH=1e-4 TRAIN_STEPS=10 MICRO_BATCHES=8 PYTHON=python bash tests/run_full_suite.sh [flags of tests/tests_equiv.py]
set -u
cd "$(dirname "$0")/.." || exit 2
export THRESH="${THRESH:-1e-4}" TRAIN_STEPS="${TRAIN_STEPS:-10}" MICRO_BATCHES="${MICRO_BATCHES:-8}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi

passed=() failed=() left_out=()
run() { # dp ep tp pp
    local name="dp=$1 ep=$2 tp=$3 pp=$4" ranks=$(($1 * $2 * $3 * $4)) output
    if [ "$ranks" -gt "${MAX_RANKS:-$ranks}" ]; then
        left_out+=("$name (not run: more ranks than MAX_RANKS=$MAX_RANKS)")
        return
    fi
    echo "--- $name"
    if output=$("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$ranks" \
        tests/tests_equiv.py --dp "$1" --ep "$2" --tp "$3" --pp "$4" "${flags[@]}" 2>&1); then
        passed+=("$name ($(grep -o 'diff=[^ ]*' <<<"$output"))")
    else
        failed+=("$name ($(grep -o 'diff=[^ ]*' <<<"$output" || echo 'did not finish'))")
        tail -n 40 <<<"$output"
    fi
    grep -E '^(losses|FAIL|OK)' <<<"$output"
}

flags=("$@")
#   dp ep tp pp
run 4 1 1 1
run 1 1 4 1
run 1 1 1 4
run 2 1 2 1
run 2 1 1 2
run 1 1 2 2
run 2 1 2 2
run 1 2 2 2
run 2 4 1 1

echo "=== Summary ==="
echo "PASS (${#passed[@]}):"
[ ${#passed[@]} -eq 0 ] || printf '  %s\n' "${passed[@]}"
echo "FAIL (${#failed[@]}):"
[ ${#failed[@]} -eq 0 ] || printf '  %s\n' "${failed[@]}"
[ ${#left_out[@]} -eq 0 ] || printf '  %s\n' "${left_out[@]}"
[ ${#failed[@]} -eq 0 ]

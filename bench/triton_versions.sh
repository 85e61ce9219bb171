#!/usr/bin/env bash
# Compile every kernel with other Triton releases than the one that torch names, each in a folder of its own beside the
# same torch: everything must compile and fit on every architecture. The bars are for the shipped release alone.
#   bash bench/triton_versions.sh [version ...]
set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON="${PYTHON:-python}"
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(3.6.0 3.8.0 3.9.0)

status=0
for version in "${versions[@]}"; do
    folder="$PWD/build/triton-$version"
    [ -d "$folder/triton" ] || "$PYTHON" -m pip install --quiet --no-deps --target "$folder" "triton==$version" || exit 2
    summary=$(PYTHONPATH="$folder" TRITON_CACHE_DIR="$folder/cache" "$PYTHON" bench/kernels.py --audit --fit-only 2>&1) || status=1
    grep '^FAIL' <<<"$summary"
    echo "triton $version: $(tail -n 1 <<<"$summary")"
done
exit $status

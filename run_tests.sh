#!/usr/bin/env bash
# Runs the tests: ./run_tests.sh [--no-install] [options of pytest]
# Left out by default: tests marked `slow`, and `data` (real data sets). To run everything: ./run_tests.sh -m ""
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/scripts/environment.sh"
prepare_environment "$root" test "$@"
cd "$root"
# Two processes with two OpenMP threads each on two cores spin against each other and are 20 times slower than one.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# By file, for the tests of one share what takes long to make; in the order that tests/conftest.py gives.
exec "$python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not slow and not data" \
    ${arguments[@]+"${arguments[@]}"}

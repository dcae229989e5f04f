#!/usr/bin/env bash
# Runs the artifact: ./run_all.sh [--no-install] [options of `python -m reproduce run`, see --help]
# The environment it needs is made on first use; scripts/environment.sh says where and how to change that.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/scripts/environment.sh"
prepare_environment "$root" run "$@"
# -P: a click.py or torch/ in the caller's directory must not be imported in place of the package.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m reproduce run ${arguments[@]+"${arguments[@]}"}

#!/usr/bin/env bash
# Twelve checks of the CUDA path on one GPU, in under nine minutes and without a network; --device cpu tries the script
# itself with a small network. docs/gpu.md says what they are and what came of them.
#   benchmarks/gpu.sh [--device cuda|cpu] [--json FILE] [--page FILE] [--logs DIR] [--only 1,3]
# Without --json the figures of a GPU go to benchmarks/results: where that does not come back, give a path that does.
# A machine that lacks packages gets them from benchmarks/gpu_wheels.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}
export PYTORCH_NVML_BASED_CUDA_CHECK=1  # asking whether there is a GPU does not start CUDA: the checks are forked
export PYTHONUNBUFFERED=1
exec "$python" "$root/benchmarks/gpu/run.py" "$@"

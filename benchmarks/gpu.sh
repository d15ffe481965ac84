#!/usr/bin/env bash
# Twelve checks of the CUDA path on one GPU, in under nine minutes, without network access. --device cpu tests the script
# itself with a small model. docs/gpu.md lists the checks and their results.
#   benchmarks/gpu.sh [--device cuda|cpu] [--json FILE] [--page FILE] [--logs DIR] [--only 1,3]
# Without --json the results of a GPU go to benchmarks/results. On a machine whose working tree is discarded, pass a path
# that is kept. benchmarks/gpu_wheels.sh provides packages that a machine lacks.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}
export PYTORCH_NVML_BASED_CUDA_CHECK=1  # check for a GPU without initializing CUDA, because the checks are forked
export PYTHONUNBUFFERED=1
exec "$python" "$root/benchmarks/gpu/run.py" "$@"

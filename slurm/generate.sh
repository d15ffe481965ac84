#!/bin/bash
# Generate clips with a job array, one GPU per task. Submit from the repository root:
#
#   sbatch slurm/generate.sh /shared/runs/t2v_2b --prompts prompts.txt --num 4 --out /shared/clips
#   sbatch --array=0-63 --partition=gpu slurm/generate.sh ...            # more tasks
#
# Arguments after the script's name go to `flowception generate`. Task k of n makes batches k, k + n, k + 2 n ... of the
# set. The seed of a clip depends only on its number, so the set is the same for any number of tasks. The last task to
# finish writes clips.jsonl. If tasks are killed, submit them again: --array=3,7 with NUM_PARTS=16 for tasks 3 and 7 of 16.
#SBATCH --job-name=flowception-generate
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

export FLOWCEPTION_HOME=${FLOWCEPTION_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
source "$FLOWCEPTION_HOME/slurm/parts.sh" # sources the site; sets NUM_PARTS
exec srun python -u -m flowception.cli generate "$@" --part "$SLURM_ARRAY_TASK_ID" --num-parts "$NUM_PARTS"

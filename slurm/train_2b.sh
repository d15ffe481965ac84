#!/bin/bash
# Train the 2b preset on 8 nodes of 8 GPUs with ZeRO-3. Submit from the repository root:
#
#   sbatch slurm/train_2b.sh data.path=/shared/shards run_dir=/shared/runs/t2v_2b
#
# Arguments after the script's name go to train/main.py. Other sizes: sbatch --nodes=1 slurm/train_2b.sh ...
# The same command resumes from the newest valid checkpoint. Before its time limit the job saves and requeues itself,
# until max_steps are done. It also requeues itself after a failure, at most MAX_FAILURES (default: 3) times in a row
# without a newer checkpoint.
#SBATCH --job-name=flowception-2b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

export FLOWCEPTION_HOME=${FLOWCEPTION_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
export FLOWCEPTION_SITE=${FLOWCEPTION_SITE:-$FLOWCEPTION_HOME/slurm/site.sh}
CONFIG=${CONFIG:-$FLOWCEPTION_HOME/configs/t2v_2b.yaml}
cd "$FLOWCEPTION_HOME"

export PYTHONPATH=$FLOWCEPTION_HOME${PYTHONPATH:+:$PYTHONPATH}

# The first node of the job is the rendezvous host. The port depends on the job number, so that two jobs do not collide,
# and is below the ephemeral ports of Linux (from 32768).
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${HOSTS%%$'\n'*}
MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST," \
     "meeting at $MASTER_ADDR:$MASTER_PORT"

# Print the step of the newest checkpoint; -1 if there is none or it cannot be found.
newest_step() {
  local step
  step=$(timeout 300 bash -c '
    set -e
    source "$FLOWCEPTION_SITE" >&2
    exec python train/main.py --newest-step --config "$@"
  ' newest "$CONFIG" "$@") || step=-1
  echo "$step"
}
MAX_FAILURES=${MAX_FAILURES:-3}
FAILURES=$FLOWCEPTION_HOME/flowception-$SLURM_JOB_ID.failures # number of failures in a row, if any
first_step=$(newest_step "$@")

# srun starts one Python process per GPU, without the deepspeed launcher, which does not forward signals. All five variables
# that torch.distributed reads must be set, or DeepSpeed looks for mpi4py. SLURM_WAIT seconds after the first task ends, srun
# ends the others, so that a lost rank does not leave them in a collective. --kill-on-bad-exit would be faster, but the exit
# codes of the tasks it kills would hide exit code 85.
export SLURM_WAIT=${SLURM_WAIT:-120}
status=0
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
  set -euo pipefail
  set +u # modules and conda fail under -u
  source "$FLOWCEPTION_SITE"
  set -u
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
  exec python -u train/main.py --config "$@"
' train "$CONFIG" "$@" || status=$?

# 85: the tasks received USR1 (300 s or more before the time limit) or SIGTERM, finished their step and saved. 0 is complete,
# 2 is bad input, 130 and 143 are a SIGINT or SIGTERM from outside. Anything else is a failure: a hang (86), a lost rank or
# out of memory (137), an exception (1).
why="" failures=0
case $status in
  0 | 2 | 130 | 143) ;;
  85) why="stopped by a signal and saved" ;;
  *)
    step=$(newest_step "$@")
    [ "$step" -gt "$first_step" ] || failures=$(($(cat "$FAILURES" 2>/dev/null || echo 0) + 1))
    why="failed with exit code $status, newest checkpoint: $step (at its start: $first_step)"
    if [ "$failures" -gt "$MAX_FAILURES" ]; then
      echo "job $SLURM_JOB_ID $why; failed $failures times in a row without a newer one: giving up"
      why="" failures=0
    fi
    ;;
esac
if [ "$failures" -gt 0 ]; then echo "$failures" >"$FAILURES"; else rm -f "$FAILURES"; fi

# Put the same job back in the queue; it resumes. The requeue kills this script, hence the sleep.
if [ -n "$why" ]; then
  echo "job $SLURM_JOB_ID $why; requeueing"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$status"

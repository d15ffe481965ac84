#!/bin/bash
# Train the 2b preset on 8 nodes of 8 GPUs with ZeRO-3. Submit from the repository's folder:
#
#   sbatch slurm/train_2b.sh data.path=/shared/shards run_dir=/shared/runs/t2v_2b
#
# Every word after the script's name goes to train/main.py. Other sizes: sbatch --nodes=1 slurm/train_2b.sh ...
# The same command submitted again resumes from the newest valid checkpoint. Before its time limit the job saves and
# requeues itself, until max_steps are done.
#SBATCH --job-name=flowception-2b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
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

# The first node of the job is the meeting point; the port follows from the job, so that two jobs do not collide, and
# lies below those that Linux hands out to connections (from 32768 on).
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${HOSTS%%$'\n'*}
MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST," \
     "meeting at $MASTER_ADDR:$MASTER_PORT"

# srun starts one Python per GPU, without the deepspeed launcher (which forwards no signals). All five variables that
# torch.distributed reads must be set, or DeepSpeed looks for mpi4py. SLURM_WAIT: so many seconds after the first task has
# ended the others are ended too, so a lost rank does not leave them in a collective; --kill-on-bad-exit would be faster,
# but it would also hide exit code 85 behind that of the tasks it ends.
export SLURM_WAIT=${SLURM_WAIT:-120}
status=0
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
  set -euo pipefail
  source "$FLOWCEPTION_SITE"
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
  exec python -u train/main.py --config "$@"
' train "$CONFIG" "$@" || status=$?

# 85: the tasks got USR1 (300 s or more before the time limit) or SIGTERM, finished their step and saved. The same job
# goes to the end of the queue and resumes. The requeue kills this script, hence the sleep.
if [ "$status" = 85 ]; then
  echo "job $SLURM_JOB_ID stopped by a signal and saved; requeueing"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$status"

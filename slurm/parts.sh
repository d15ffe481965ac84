# Sourced by the job arrays, which set FLOWCEPTION_HOME: goes there and sources the site.
export FLOWCEPTION_SITE=${FLOWCEPTION_SITE:-$FLOWCEPTION_HOME/slurm/site.sh}
cd "$FLOWCEPTION_HOME"
set +u # modules and conda fail under -u
source "$FLOWCEPTION_SITE"
set -u
export PYTHONPATH=$FLOWCEPTION_HOME${PYTHONPATH:+:$PYTHONPATH}

# NUM_PARTS, the number of tasks among which the work is divided, is the array's own count, unless only some tasks of a
# larger one are run: NUM_PARTS=16 sbatch --array=3,7 ...
if [ -z "${NUM_PARTS:-}" ]; then
  NUM_PARTS=$SLURM_ARRAY_TASK_COUNT
  if [ "$SLURM_ARRAY_TASK_MIN" != 0 ] || [ "$SLURM_ARRAY_TASK_MAX" != $((NUM_PARTS - 1)) ]; then
    echo "the array is not 0-$((NUM_PARTS - 1)): set NUM_PARTS to the number of tasks of the whole array" >&2
    exit 2
  fi
fi
echo "job $SLURM_ARRAY_JOB_ID, task $SLURM_ARRAY_TASK_ID of $NUM_PARTS, start ${SLURM_RESTART_COUNT:-0}, on $(hostname)"

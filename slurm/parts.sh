# Sourced by the job arrays, which set FLOWCEPTION_HOME. Changes to that directory and sources the site file.
export FLOWCEPTION_SITE=${FLOWCEPTION_SITE:-$FLOWCEPTION_HOME/slurm/site.sh}
cd "$FLOWCEPTION_HOME"
set +u # modules and conda fail under -u
source "$FLOWCEPTION_SITE"
set -u
export PYTHONPATH=$FLOWCEPTION_HOME${PYTHONPATH:+:$PYTHONPATH}

# NUM_PARTS is the number of tasks that divide the work. It is the size of the array, unless only some tasks of a larger
# array are run: NUM_PARTS=16 sbatch --array=3,7 ...
if [ -z "${NUM_PARTS:-}" ]; then
  NUM_PARTS=$SLURM_ARRAY_TASK_COUNT
  if [ "$SLURM_ARRAY_TASK_MIN" != 0 ] || [ "$SLURM_ARRAY_TASK_MAX" != $((NUM_PARTS - 1)) ]; then
    echo "the array must be 0-$((NUM_PARTS - 1)), got $SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX;" \
      "set NUM_PARTS to the number of tasks of the full array" >&2
    exit 2
  fi
fi
echo "job $SLURM_ARRAY_JOB_ID, task $SLURM_ARRAY_TASK_ID of $NUM_PARTS, start ${SLURM_RESTART_COUNT:-0}, on $(hostname)"

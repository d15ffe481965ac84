# Settings of a cluster. Copy this file, edit the copy, and source it before you submit:
#
#   source slurm/site.mine.sh && sbatch slurm/train_2b.sh data.path=/shared/shards run_dir=/shared/runs/t2v_2b
#
# The jobs source it again (train_2b.sh in every task). Options on the sbatch command line override it.
FLOWCEPTION_SITE=$(realpath "${BASH_SOURCE[0]}")
export FLOWCEPTION_SITE
export FLOWCEPTION_HOME=${FLOWCEPTION_HOME:-$PWD}

# Partition and account: sbatch reads these variables.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=me

# Environment: modules first, then the .venv of `make setup`, or the start-up command of a container.
# module load python/3.11   # no CUDA module: torch includes the CUDA libraries, and a module would shadow them
source "$FLOWCEPTION_HOME/.venv/bin/activate"

# CPU threads per rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# GPU memory. The amount of text per pack varies, so allocation sizes differ from step to step. Expandable segments reduce
# fragmentation.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# Network. Set the interface between nodes if NCCL or gloo picks the wrong one (`ip -br address` lists them).
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# NCCL. With torch's defaults, an error or timeout of a collective ends the process (TORCH_NCCL_ASYNC_ERROR_HANDLING=3: it
# does not clean up communicators, which can hang too). The watchdog ends a hung job earlier (docs/training.md, Hangs).
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Where torch writes its record of collectives after its own timeout, if guard.hang_timeout_s is off.
# export TORCH_FR_DUMP_TEMP_FILE=/shared/$USER/collectives_rank_

# Compiled extensions and offline wandb runs, on storage shared by all nodes.
# export TORCH_EXTENSIONS_DIR=/shared/$USER/torch_extensions
# export WANDB_DIR=/shared/$USER/wandb

# What differs from one cluster to the next. Copy it, edit the copy, and source it before you submit:
#
#   source slurm/site.mine.sh && sbatch slurm/train_2b.sh data.path=/shared/shards run_dir=/shared/runs/t2v_2b
#
# The jobs source it again, train_2b.sh in every task. Options on sbatch's command line win over what is set here.
FLOWCEPTION_SITE=$(realpath "${BASH_SOURCE[0]}")
export FLOWCEPTION_SITE
export FLOWCEPTION_HOME=${FLOWCEPTION_HOME:-$PWD}

# Partition and account: sbatch reads these variables.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=me

# Environment: modules first, then `make setup`'s .venv; a container's start-up line can stand here instead.
# module load python/3.11   # torch brings CUDA's libraries along: a CUDA module would only put others before them
source "$FLOWCEPTION_HOME/.venv/bin/activate"

# Threads of the host-side part of each rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# GPU memory. Packs have as much text as they have, so blocks of memory differ in size from step to step; segments that can
# grow keep them from leaving holes.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# Network. Name the interface that joins the nodes if NCCL or gloo picks a wrong one (`ip -br address` lists them).
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# NCCL. An error or a timeout of a collective ends the process by torch's defaults (TORCH_NCCL_ASYNC_ERROR_HANDLING=3: without
# cleaning up communicators, which can itself hang); a hang ends the job earlier (docs/training.md, Hangs).
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Where torch writes its record of collectives after a timeout of its own, where guard.hang_timeout_s is off.
# export TORCH_FR_DUMP_TEMP_FILE=/shared/$USER/collectives_rank_

# Compiled extensions and wandb's offline runs, on storage that all nodes see.
# export TORCH_EXTENSIONS_DIR=/shared/$USER/torch_extensions
# export WANDB_DIR=/shared/$USER/wandb

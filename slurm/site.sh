# What differs from one cluster to the next. Copy it, edit it, and point FLOWCEPTION_SITE at your copy.
# It is sourced on the first node by the batch script, and again inside every task.

# The environment: `make setup` builds .venv; a module or a container's start-up line can stand here instead.
FLOWCEPTION_HOME=${FLOWCEPTION_HOME:-$PWD}
source "$FLOWCEPTION_HOME/.venv/bin/activate"

# Threads of the host-side part of each rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# Network. Name the interface that joins the nodes if NCCL or gloo picks a wrong one (`ip -br address` lists them).
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# NCCL: turn a hung collective into an error instead of waiting for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Compiled extensions and wandb's offline runs, on storage that all nodes see.
# export TORCH_EXTENSIONS_DIR=/shared/$USER/torch_extensions
# export WANDB_DIR=/shared/$USER/wandb

"""How tests compile without a C++ compiler."""

TRACED = "aot_eager_decomp_partition"
"""The backend of torch.compile that differentiates and partitions as Inductor does, and runs operators one by one."""

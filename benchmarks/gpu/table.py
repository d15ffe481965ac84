"""The twelve checks with their time limits, cheap and decisive checks first.

The limits add up to more than the total limit, because few checks need theirs in full. The last checks, which are the
most informative, have reserved time, so that slow early checks cannot use it up.
"""

from __future__ import annotations

from benchmarks.gpu.outcome import Check

CHECKS = (
    Check(
        1,
        "environment",
        "versions, the modules that training imports, one collective, FlashAttention-3 and -4",
        "benchmarks.gpu.environment:environment",
        45,
    ),
    Check(
        2,
        "cached sampling",
        "sampling with cached keys and values in bfloat16, compared with float32 on the CPU, state by state",
        "benchmarks.gpu.sampling_checks:cached_sampling",
        30,
    ),
    Check(
        3,
        "attention against fp64",
        "training's attention, forward and backward, on packs of the recipe's static shape (planned, full, padding "
        "only): relative error below 1e-2 against plain float64, no NaN",
        "benchmarks.gpu.attention_checks:against_float64",
        40,
    ),
    Check(
        4,
        "pytest -m gpu",
        "the tests that need a GPU, and the fake-CUDA tests on a CUDA build of torch; some of each must run and none "
        "may fail",
        "benchmarks.gpu.environment:gpu_tests",
        90,
    ),
    Check(
        5,
        "leaves",
        "the operations between a block's matrix products, eager and compiled, against float64 formulas; one graph "
        "each over three packs",
        "benchmarks.gpu.block_checks:leaves",
        75,
    ),
    Check(
        6,
        "one block, by operator",
        "time of each operator of a block, forward and backward, eager and compiled, with TB/s or TFLOP/s; "
        "modulation gradients summed by runs, compared with `index_add_`",
        "benchmarks.gpu.speed_checks:operators",
        60,
    ),
    Check(
        7,
        "segments",
        "attention with the static number of segments and with the pack's actual segments, by FlashAttention-2, -3 "
        "and -4: milliseconds and working memory",
        "benchmarks.gpu.attention_checks:segments",
        45,
    ),
    Check(
        8,
        "a block as one graph",
        "model.compile=blocks on packs with different contents: one graph with gradients and one without, no breaks, "
        "gradients equal to those of the eager network up to rounding",
        "benchmarks.gpu.block_checks:whole_blocks",
        75,
    ),
    Check(
        9,
        "ZeRO 0 to 3",
        "ten steps of a small network with DeepSpeed, one of them rejected, compared with plain torch: fp32 and bf16",
        "benchmarks.gpu.zero_checks:every_stage",
        90,
    ),
    Check(
        10,
        "the recipe",
        "the complete network at ZeRO-3, with four ways to run its blocks: milliseconds per pack, MFU, peak memory",
        "benchmarks.gpu.recipe_checks:four_ways",
        230,
        160,
    ),
    Check(
        11,
        "waiting for the GPU",
        "where a step makes the host wait for the GPU, and how busy both are",
        "benchmarks.gpu.waiting_check:waiting",
        60,
        30,
    ),
    Check(
        12,
        "save, kill, resume",
        "a run killed at a random step and resumed ends with the same hashes as an uninterrupted run",
        "benchmarks.gpu.resume_check:killed_and_resumed",
        100,
        35,
    ),
)
TOTAL_LIMIT_S = 535.0
"""Seconds for all checks, from the start of the script: under nine minutes."""
CPU_PATIENCE = 10.0
"""Factor for all limits on a CPU, where nothing is measured and a busy machine must not cause failures."""

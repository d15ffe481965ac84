"""The twelve checks, cheap and deciding ones first, each with its time limit.

The limits add up to more than all may take together, since few checks need theirs. So that slow ones among the first do
not cost the last, which say most, those have seconds kept for them.
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
        "sampling with kept keys and values in bfloat16, against the same in float32 on the CPU, state by state",
        "benchmarks.gpu.sampling_checks:cached_sampling",
        30,
    ),
    Check(
        3,
        "attention against fp64",
        "the run's attention, forward and backward, in a pack of the recipe's static shape, a full one and one of "
        "padding alone: relative error below 1e-2 against plain float64, no NaN",
        "benchmarks.gpu.attention_checks:against_float64",
        40,
    ),
    Check(
        4,
        "pytest -m gpu",
        "the tests that need a GPU, and those with a stand-in for CUDA, here on a torch built for it; some of each "
        "must run and none fail",
        "benchmarks.gpu.environment:gpu_tests",
        90,
    ),
    Check(
        5,
        "leaves",
        "what a block computes between its products, eager and compiled, against float64 formulas; one graph each "
        "over three packs",
        "benchmarks.gpu.block_checks:leaves",
        75,
    ),
    Check(
        6,
        "one block, by operator",
        "time of each operator of a block, forward and backward, eager and compiled, with TB/s or TFLOP/s; "
        "modulation's gradients summed by runs beside `index_add_`",
        "benchmarks.gpu.speed_checks:operators",
        60,
    ),
    Check(
        7,
        "segments",
        "attention with the static number of segments against the pack's own, by FlashAttention-2, -3 and -4: "
        "milliseconds and working memory",
        "benchmarks.gpu.attention_checks:segments",
        45,
    ),
    Check(
        8,
        "a block as one graph",
        "model.compile=blocks on packs of different contents: one graph for training and one without gradients, no "
        "breaks, gradients as those of the eager network",
        "benchmarks.gpu.block_checks:whole_blocks",
        75,
    ),
    Check(
        9,
        "ZeRO 0 to 3",
        "ten steps of a small network by DeepSpeed, one of them refused, against plain torch: fp32 and bf16",
        "benchmarks.gpu.zero_checks:every_stage",
        90,
    ),
    Check(
        10,
        "the recipe",
        "the whole network at ZeRO-3, four ways to run its blocks: milliseconds a pack, MFU, peak memory",
        "benchmarks.gpu.recipe_checks:four_ways",
        230,
        160,
    ),
    Check(
        11,
        "waiting for the GPU",
        "where a step makes the host wait, and what the GPU and the host do in it",
        "benchmarks.gpu.waiting_check:waiting",
        60,
        30,
    ),
    Check(
        12,
        "save, kill, resume",
        "a run killed at a random step and resumed ends with the hashes of one that was not",
        "benchmarks.gpu.resume_check:killed_and_resumed",
        100,
        35,
    ),
)
TOTAL_LIMIT_S = 535.0
"""Seconds of everything, from the start of the script: under nine minutes."""
CPU_PATIENCE = 10.0
"""Times as long on a CPU, where nothing is measured and a busy machine must spoil nothing."""

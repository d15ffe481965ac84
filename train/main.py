"""Train a Flowception model: ``deepspeed train/main.py --config C [overlay.yaml ...] [key=value ...] [--dry-run]``.

The same command resumes the run. Also works with torchrun, ``srun python``, or plain ``python`` for one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flowception.training.signals import EXIT_STOPPED, StopFlag

if TYPE_CHECKING:
    from flowception.training.config import TrainConfig
    from flowception.training.data import TrainingData
    from flowception.training.distributed.collectives import Ranks
    from flowception.training.samples import StepSampler

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    ``--local_rank`` comes from the deepspeed launcher and is ignored, because the environment has it too.
    """
    parser = argparse.ArgumentParser(prog="train/main.py", description="Train a Flowception model.")
    parser.add_argument(
        "--config", nargs="+", required=True, metavar="C", help="YAML files (later ones win) and key=value"
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="more YAML files and overrides")
    parser.add_argument("--newest-step", action="store_true", help="print the step of the newest checkpoint, or -1")
    parser.add_argument("--dry-run", action="store_true", help="print configuration and estimates, do not train")
    dry = parser.add_argument_group("with --dry-run")
    dry.add_argument("--world-size", default="", metavar="W,...", help="numbers of ranks (default: as launched, 8, 64)")
    dry.add_argument("--hfu", type=float, default=0.4, metavar="H", help="achieved share of the peak (0.4)")
    dry.add_argument(
        "--peak-tflops", type=float, metavar="P", help="TFLOP/s per rank (default: logging.peak_tflops, or 989)"
    )
    dry.add_argument("--bandwidth", type=float, default=25.0, metavar="B", help="GB/s per GPU between nodes (25)")
    dry.add_argument("--inside-node", type=float, default=300.0, metavar="B", help="GB/s per GPU inside a node (300)")
    dry.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="GPUs that share a node's network (8)")
    dry.add_argument(
        "--stage-3-block-ms", type=float, default=1.0, metavar="MS", help="host time per block at ZeRO-3 (1)"
    )
    dry.add_argument("--memory-bandwidth", type=float, default=3000.0, metavar="B", help="GB/s of device memory (3000)")
    dry.add_argument(
        "--memory-gb", default="", metavar="M,...", help="memory per device (default: memory_gib, or 80, 141)"
    )
    dry.add_argument("--clip", metavar="FxHxW", help="plan with clips of F latent frames, H rows, W columns")
    dry.add_argument("--text-tokens", type=int, default=0, metavar="L", help="text tokens per clip, with --clip (0)")
    dry.add_argument("--num-clips", type=int, default=20_000, metavar="N", help="number of clips, with --clip (20000)")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    words = [*arguments.config, *arguments.words]
    arguments.config = [word for word in words if "=" not in word]
    arguments.words = [word for word in words if "=" in word]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job.

    Returns:
        0 if the run is complete; 85 if a signal stopped it, whether or not its save succeeded; 2 for bad input, or for
        a dry run that found a problem. If a rank hangs, the process exits with 86 without returning here
        (``training.distributed.watchdog``).
    """
    stop = StopFlag().install()
    arguments = parse(sys.argv[1:] if argv is None else argv)
    from flowception.errors import FlowceptionError

    try:
        return _run(arguments, stop)
    except FlowceptionError as error:
        rank = _rank("RANK", "SLURM_PROCID")
        if rank == 0 or not error.on_all_ranks:
            who = f"rank {rank}: " if rank else ""
            print(f"train/main.py: {who}error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT


def _rank(name: str, slurm_name: str) -> int:
    """A rank from the launcher's or Slurm's variable; 0 for a single process."""
    return int(os.environ.get(name) or os.environ.get(slurm_name) or 0)


def _run(arguments: argparse.Namespace, stop: StopFlag) -> int:
    from flowception.errors import FlowceptionError
    from flowception.training.config import load_config

    try:
        config = load_config(arguments.config, arguments.words)
    except FlowceptionError as error:
        # Print once per node, whose ranks read the same files.
        error.on_all_ranks = _rank("LOCAL_RANK", "SLURM_LOCALID") > 0
        raise
    if arguments.dry_run:
        return _dry_run(config, arguments)
    if arguments.newest_step:
        from flowception.checkpoint.format import list_steps

        print(max(list_steps(config.run_dir), default=-1))
        return 0

    import torch

    from flowception.training.distributed.launch import init_distributed
    from flowception.training.trainer import train

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    ranks = init_distributed()
    complete = train(config, ranks, stop, _make_sampler if config.samples.every_steps else None)
    return 0 if complete else EXIT_STOPPED


def _make_sampler(config: TrainConfig, data: TrainingData, ranks: Ranks) -> StepSampler:
    """Build the sampler, which uses held-out clips, or training clips if none are held out."""
    from flowception.generation.training_sampler import TrainingSampler
    from flowception.training.data import heldout_plan

    plan = heldout_plan(config, data) if len(data.heldout_rows) else data.plan
    samples = config.samples
    return TrainingSampler(
        config,
        data.reader,
        plan,
        folder=Path(config.run_dir) / "samples",
        num_clips=samples.num_clips,
        num_inference_steps=samples.num_inference_steps,
        max_frames=samples.max_frames,
        guidance=samples.guidance,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
    )


def _dry_run(config: TrainConfig, arguments: argparse.Namespace) -> int:
    """Print the report on rank 0. Returns an exit code, nonzero if a problem would stop the run."""
    from flowception.training.estimate.report import Assumptions, report

    if _rank("RANK", "SLURM_PROCID") != 0:
        return 0
    text, problems = report(
        config,
        Assumptions(
            world_sizes=arguments.world_size,
            hfu=arguments.hfu,
            peak_tflops=arguments.peak_tflops,
            bandwidth_gb_per_s=arguments.bandwidth,
            inside_node_gb_per_s=arguments.inside_node,
            gpus_per_node=arguments.gpus_per_node,
            stage_3_block_ms=arguments.stage_3_block_ms,
            memory_gb_per_s=arguments.memory_bandwidth,
            memory_gb=arguments.memory_gb,
            clip=arguments.clip,
            text_tokens=arguments.text_tokens,
            num_clips=arguments.num_clips,
        ),
    )
    print(text)
    return EXIT_BAD_INPUT if problems else 0


def leave(code: int) -> NoReturn:
    """Exit without interpreter shutdown.

    During shutdown a gloo thread may still hold a tensor. To release it, the thread needs the interpreter, which is
    gone, and the process then dies with SIGABRT instead of its exit code (seen in 1 of 12 short runs).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main_and_leave() -> NoReturn:
    """Run the job and exit; an unexpected error exits with 1.

    Interpreter shutdown could wait forever for a thread or for NCCL, and the other ranks would wait for this one.
    """
    try:
        code = main()
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    main_and_leave()

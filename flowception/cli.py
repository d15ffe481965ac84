"""The ``flowception`` command: plan, plot, generate, checkpoint, doctor.

A ``FlowceptionError`` is printed as one line on stderr, with exit code 2. Heavy modules are imported inside the
subcommands that need them, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flowception import __version__
from flowception.errors import CheckpointError, ConfigError, FlowceptionError, RunDirectoryError

EXIT_BAD_INPUT = 2
"""Exit code of every ``FlowceptionError``; the same as argparse."""
INSERTION_RULES = ("thinning", "bernoulli", "poisson")
TASKS = ("t2v", "i2v", "v2v", "interpolation", "completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program name; None uses ``sys.argv``.

    Returns:
        Exit code: 0 for success, 2 for bad input.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "config" not in arguments):
        parser.error(
            f"unrecognized arguments: {' '.join(rest)}; see flowception {{plan,plot,generate,checkpoint,doctor}} --help"
        )
    arguments.overrides = rest
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except FlowceptionError as error:
        print(f"flowception: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("flowception: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="flowception", description="Plan, inspect and use Flowception runs.")
    parser.add_argument("--version", action="version", version=f"flowception {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="{plan,plot,generate,checkpoint,doctor}")
    _add_plan(subparsers.add_parser("plan", help="show what each step of a training run will contain"))
    _add_plot(subparsers.add_parser("plot", help="draw a run's curves from its metrics.jsonl"))
    _add_generate(subparsers.add_parser("generate", help="generate clips from a run"))
    _add_checkpoint(subparsers.add_parser("checkpoint", help="list, verify or hash a run's checkpoints"))
    doctor = subparsers.add_parser("doctor", help="check this machine: versions, GPUs, attention, codecs, disk")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", nargs="+", required=True, metavar="C", help="YAML files, later ones win; then key=value overrides"
    )
    parser.add_argument("--world-size", type=_positive, default=1, metavar="R", help="ranks (default: 1)")
    parser.add_argument("--steps", type=_positive, default=10, metavar="N", help="steps to show (default: 10)")
    parser.add_argument(
        "--start", type=_natural, default=0, metavar="K", help="first step, counted from 0 (default: 0)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the table to FILE as JSON, one object per step"
    )
    parser.set_defaults(command=_plan)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="png, svg or pdf (default: RUN/curves.png)")
    parser.set_defaults(command=_plot)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--task", choices=TASKS, default="t2v", help="default: t2v")
    parser.add_argument(
        "--context",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="i2v: images or videos; v2v, completion: videos; interpolation: two or more images in order, or videos",
    )
    parser.add_argument(
        "--keep",
        metavar="FRAMES",
        help="latent frames of a context video to keep, counted from 0, such as 0-3,8-11 (default: v2v the end, "
        "interpolation the first and last, completion the first and last quarter)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="caption, for a model trained with text")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one caption per line, blank lines skipped; or .jsonl, one object per line with prompt and optionally "
        "seed and class_label. Clips cycle over the prompts, as over --context",
    )
    parser.add_argument("--text-encoder", metavar="MODEL", help="T5 encoder for prompts: a folder or hub id")
    parser.add_argument(
        "--class-label",
        metavar="K|NAME",
        help="class number or name, or null for none (default: t2v cycles over the classes, other tasks use none)",
    )
    parser.add_argument(
        "--num",
        type=_positive,
        metavar="N",
        help="clips to generate; with --prompts, clips per prompt (default then: 1)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the clips")
    parser.add_argument("--seed", type=_natural, default=0, metavar="S", help="clip i has seed S + i (default: 0)")
    parser.add_argument("--checkpoint", type=_natural, metavar="STEP", help="default: the newest valid one")
    _add_sampling(parser)
    parser.set_defaults(command=_generate)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance scale (default: off)")
    parser.add_argument(
        "--rate-guidance", type=float, metavar="G", help="the same for the insertion rate (default: off)"
    )
    parser.add_argument("--insertion", choices=INSERTION_RULES, default="thinning", help="default: thinning")
    parser.add_argument("--num-inference-steps", type=_positive, default=50, metavar="N", help="default: 50")
    parser.add_argument(
        "--cache-refresh",
        type=_positive,
        metavar="R",
        help="cache keys and values of finished frames, recomputed every R steps (default: off, exact)",
    )
    parser.add_argument(
        "--max-frames",
        type=_positive,
        default=64,
        metavar="N",
        help="cap on latent frames, context included (default: 64)",
    )
    parser.add_argument(
        "--num-frames", type=_positive, metavar="N", help="latent frames, for runs with a prescribed delay law"
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=16, metavar="B", help="clips sampled at once (default: 16)"
    )
    parser.add_argument(
        "--part", type=_natural, default=0, metavar="K", help="generate part K of --num-parts, from 0 (default: 0)"
    )
    parser.add_argument(
        "--num-parts",
        type=_positive,
        default=1,
        metavar="N",
        help="split the set over N separate commands (default: 1)",
    )
    parser.add_argument("--size", metavar="HxW", help="pixels; required if the run was trained at several sizes")
    parser.add_argument(
        "--fps", type=float, metavar="FPS", help="frame rate of the files written (default: the training data's)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: cuda if available)")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--verify", action="store_true", help="read every file and check its sha256")
    parser.add_argument("--hash", action="store_true", help="print one sha256 each for weights, ema and optimizer")
    parser.add_argument("--checkpoint", type=_natural, metavar="STEP", help="default: the newest valid one")
    parser.set_defaults(command=_checkpoint)


def _natural(word: str) -> int:
    return _at_least(word, 0)


def _positive(word: str) -> int:
    return _at_least(word, 1)


def _at_least(word: str, least: int) -> int:
    try:
        number = int(word)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"must be an integer >= {least}, got {word!r}")
    return number


def _size(word: str) -> tuple[int, int]:
    parts = word.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--size must be height x width in pixels, such as 256x256, got {word!r}")
    return int(parts[0]), int(parts[1])


def _plan(arguments: argparse.Namespace) -> int:
    import json

    from flowception.data.plan_table import plan_table
    from flowception.training.config import load_config
    from flowception.training.data import open_data

    files = [word for word in arguments.config if "=" not in word]
    overrides = [word for word in arguments.config if "=" in word] + arguments.overrides
    plan = open_data(load_config(files, overrides)).plan
    table = plan_table(plan, arguments.world_size, arguments.start, arguments.steps)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")
    print(f"plan {plan.fingerprint[:12]}: {len(plan.rows)} clips, {plan.steps_in_epoch(0)} steps in the first epoch")
    print(f"{'step':>8} {'order':<12} {'clips':>6} {'tokens':>9} {'fill':>6} {'imbalance':>10} {'attention':>10}")
    for row in table:
        print(
            f"{row['step']:>8} {row['order_hash'][:12]} {row['clips']:>6} {row['tokens']:>9} {row['fill']:>6.3f} "
            f"{row['flops_imbalance']:>10.4f} {row['attention_ratio']:>10.4f}"
        )
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from flowception.training.curves import draw_curves

    path: Path = arguments.out or arguments.run / "curves.png"
    for note in draw_curves(arguments.run, path):
        print(note)
    print(f"curves: {path}")
    return 0


def _checkpoint(arguments: argparse.Namespace) -> int:
    from flowception.checkpoint.format import checkpoint_dir, list_steps
    from flowception.checkpoint.reader import hashes, latest_valid
    from flowception.progress import show_log

    show_log(stream="stderr")

    run_dir: Path = arguments.run
    if not run_dir.is_dir():
        raise RunDirectoryError(f"{run_dir} does not exist; give a run directory")
    steps = list_steps(run_dir)
    if not steps:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; wait for the first one")
    if arguments.checkpoint is not None:
        if arguments.checkpoint not in steps:
            raise CheckpointError(f"{run_dir} has no checkpoint of step {arguments.checkpoint}; available: {steps}")
        steps = [arguments.checkpoint]
    if arguments.verify or not arguments.hash:
        _list_checkpoints(run_dir, steps, verified=arguments.verify)
    if arguments.hash:
        if arguments.checkpoint is None:
            folder = latest_valid(run_dir)
        else:
            folder = checkpoint_dir(run_dir, arguments.checkpoint)
        for name, digest in hashes(folder or run_dir).items():
            print(f"{name} {digest}")
    return 0


def _list_checkpoints(run_dir: Path, steps: Sequence[int], *, verified: bool) -> None:
    """Print a line for each checkpoint, then raise an error if any is damaged."""
    from flowception.checkpoint.format import checkpoint_dir, read_manifest
    from flowception.checkpoint.reader import verify

    damaged = []
    for step in steps:
        try:
            manifest = (verify if verified else read_manifest)(checkpoint_dir(run_dir, step))
        except CheckpointError as error:
            damaged.append(step)
            print(f"step {step}: damaged: {error}")
        else:
            size = sum(record.size_bytes for record in manifest.files.values())
            found = "valid" if verified else "not verified"
            print(f"step {step}: {found}, {len(manifest.files)} files, {size / 1e6:.1f} MB")
    if damaged:
        raise CheckpointError(f"{run_dir} has damaged checkpoints of steps {damaged}; a resumed run skips them")


def _generate(arguments: argparse.Namespace) -> int:
    from flowception.generation.context import parse_keep
    from flowception.generation.generate import GenerateOptions, generate
    from flowception.progress import show_log

    show_log()
    if arguments.num is None and arguments.prompts is None:
        raise ConfigError("--num is missing; give the number of clips to generate")
    same = (
        "task", "context", "prompt", "text_encoder", "seed", "num_inference_steps", "guidance",
        "rate_guidance", "insertion", "max_frames", "num_frames", "cache_refresh", "batch_size", "part", "num_parts",
        "fps", "device",
    )  # fmt: skip
    try:
        options = GenerateOptions(
            run_dir=arguments.run,
            out_dir=arguments.out,
            prompts_file=arguments.prompts,
            checkpoint_step=arguments.checkpoint,
            num=arguments.num or 1,
            keep=parse_keep(arguments.keep) if arguments.keep else None,
            size=_size(arguments.size) if arguments.size else None,
            class_label=arguments.class_label or None,
            **{name: getattr(arguments, name) for name in same},
        )
        generate(options)
    except FlowceptionError as error:
        error.args = (_as_flags(str(error)),)
        raise
    return 0


def _as_flags(message: str) -> str:
    """Replace option names in backticks by the flags of the same names."""
    return re.sub(r"`(\w+)`", lambda match: "--" + match[1].replace("_", "-"), message)


def _doctor(arguments: argparse.Namespace) -> int:
    from flowception.doctor import report
    from flowception.training.distributed.devices import find_device

    findings = report(find_device(local_rank=0).problem)
    for name, value in findings:
        print(f"{name:<24}{value}")
    return int(any(value.startswith(("FAILED", "MISSING")) for _, value in findings))


if __name__ == "__main__":
    sys.exit(main())

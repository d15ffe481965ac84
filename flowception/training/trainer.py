"""The training job, read top to bottom: open, build, resume, loop, save."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch

from flowception import run_directory
from flowception.checkpoint import writer
from flowception.config import dump
from flowception.data.loader import PackLoader, StepBatch
from flowception.data.step_plan import check_world_size
from flowception.errors import CheckpointError, DataError
from flowception.flow.delays import build_delay_law
from flowception.flow.extended_time import expected_attention_ratio
from flowception.flow.prior import effective_sample_ratio
from flowception.nn.build import build_backbone
from flowception.nn.init import initialise
from flowception.training import resume
from flowception.training.checkpointer import Saver
from flowception.training.config import TrainConfig
from flowception.training.data import TrainingData, heldout_plan, mean_log_rate, open_data
from flowception.training.diagnostics import observed_metrics
from flowception.training.distributed.collectives import (
    Ranks,
    gather_rows,
    gather_values,
    mark_on_all_ranks,
    on_main,
    run_on_all_ranks,
)
from flowception.training.distributed.sharded_state import ShardedState
from flowception.training.distributed.watchdog import Watchdog
from flowception.training.distributed.zero import build_engine, deepspeed_config, optimizer_step
from flowception.training.ema import decay_at
from flowception.training.estimate.recomputation import settle_recomputation
from flowception.training.guard import Guard
from flowception.training.hardware import find_peak, peak_memory_gib
from flowception.training.metrics import MetricsLog, Speed, check_packages
from flowception.training.optim import build_optimizer, learning_rate
from flowception.training.profiler import StepProfiler
from flowception.training.rollback import roll_back
from flowception.training.run_state import RunState, plan_of
from flowception.training.samples import ClipSampler, take_samples
from flowception.training.signals import StopFlag
from flowception.training.step import run_micro_steps
from flowception.training.validation import Validation

SamplerFactory = Callable[[TrainConfig, TrainingData, Ranks], ClipSampler]
"""Makes what samples clips during training; ``train/main.py`` hands it in, since generation stands beside training."""


def train(config: TrainConfig, ranks: Ranks, stop: StopFlag, make_sampler: SamplerFactory | None = None) -> bool:
    """Train until ``max_steps`` or until a signal; the same call resumes. Collective.

    Args:
        config: The run.
        ranks: This process among all.
        stop: Set by a signal.
        make_sampler: Makes what samples clips every ``samples.every_steps``; None samples nothing.

    Returns:
        True when the run is complete, False when it was stopped.
    """
    run_on_all_ranks(lambda: check_world_size(config.plan.packs_per_step, ranks.world_size))
    run_on_all_ranks(lambda: config.zero.check_world_size(ranks.world_size))
    run_on_all_ranks(lambda: config.profile.check_world_size(ranks.world_size))
    on_main(ranks, lambda: check_packages(config.logging))
    with _run_lock(config, ranks):
        data = run_on_all_ranks(lambda: open_data(config))
        if config.model.initial_log_rate is None:
            config.model = replace(config.model, initial_log_rate=mean_log_rate(data.plan))
        settle_recomputation(config, ranks)
        manifest = run_directory.describe(config.model, data.reader.meta) if ranks.is_main else {}
        on_main(ranks, lambda: run_directory.check(config.run_dir, manifest))
        with Watchdog(config.run_dir, config.guard, ranks) as watchdog:
            trainer = Trainer(config, ranks, data, stop, watchdog, make_sampler)
            try:
                on_main(ranks, lambda: run_directory.write(config.run_dir, dump(config), manifest))
                return trainer.run()
            finally:
                watchdog.enter("save")
                trainer.saver.close()


@contextmanager
def _run_lock(config: TrainConfig, ranks: Ranks) -> Iterator[None]:
    lock = on_main(ranks, lambda: run_directory.lock(config.run_dir))
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


class Trainer:
    """One training job."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        data: TrainingData,
        stop: StopFlag,
        watchdog: Watchdog,
        make_sampler: SamplerFactory | None = None,
    ) -> None:
        """Build the engine and resume where the run is."""
        self.watchdog, self.guard = watchdog, Guard(config.guard, config.run_dir, ranks, self._say)
        self.config, self.ranks, self.data, self.stop = config, ranks, data, stop
        self.micro_steps = -(-config.plan.packs_per_step // ranks.world_size)
        self.engine = build_engine(
            lambda: build_backbone(config.model),
            lambda model: build_optimizer(model, config.optim, ranks.device),
            deepspeed_config(
                config.zero, config.precision, self.micro_steps, config.optim.clip_grad_norm, ranks.device
            ),
            ranks.device,
        )
        self.shards = ShardedState(self.engine)
        self.saver = Saver(config.run_dir, config.checkpoint, self.shards, self._say)
        self.state = self._resume() or self._start()
        self.plan = run_on_all_ranks(lambda: plan_of(self.state, data.plan))
        self.validation = run_on_all_ranks(self._prepare_validation)
        self.sampler = run_on_all_ranks(lambda: make_sampler(config, data, ranks)) if make_sampler else None
        self.stopping, self.save_is_due = False, False
        self.profiler = StepProfiler(config.profile, config.run_dir, ranks.rank)
        self.peak = find_peak(config.logging.peak_tflops, config.precision, ranks.device)
        frames = data.plan.index.clips["frames"][data.plan.rows].astype("int64")
        self.expected_attention_ratio = expected_attention_ratio(
            config.process, frames, data.plan.index.tokens_per_frame[data.plan.rows]
        )

    def _resume(self) -> RunState | None:
        folder = resume.find_latest(self.config.run_dir, self.shards, self._say)
        if folder is None:
            return None
        state = RunState.from_json(resume.load(folder, self.shards).state)
        self.saver.saved_step = state.step
        self._say(f"resuming {self.config.run_dir} at step {state.step} of {self.config.max_steps}")
        if self.ranks.is_main:
            self._set_aside_newer(state.step)
        return state

    def _set_aside_newer(self, step: int) -> None:
        """Newer checkpoints than the one resumed from are damaged: take them out of the way, but do not delete them."""
        try:
            for folder in writer.set_aside(self.config.run_dir, newer_than=step):
                self._say(f"a damaged checkpoint was renamed to {folder}; remove it when you have no use for it")
        except OSError as error:
            self._say(f"WARNING: damaged checkpoints after step {step} could not be renamed ({error})")

    def _start(self) -> RunState:
        config = self.config
        if config.init_from is None:
            with torch.device("meta"):
                blueprint = build_backbone(config.model)
            self.shards.initialise(blueprint, lambda model, gather: initialise(model, config.seed, gather))
        else:
            source = resume.find_latest(config.init_from, self.shards, self._say)
            if source is None:
                text = f"init_from={config.init_from} has no checkpoint; give the run directory of a run that saved one"
                raise mark_on_all_ranks(CheckpointError(text))
            run_dir, meta = config.init_from, self.data.reader.meta
            on_main(self.ranks, lambda: run_directory.check_codec(run_dir, meta, new_is_fine=False))
            resume.load_initial_weights(source, self.shards)
            self._say(f"starting from the EMA weights of {source}")
        return RunState()

    def _prepare_validation(self) -> Validation | None:
        config = self.config
        if config.validation.every_steps is None:
            return None
        if not len(self.data.heldout_rows):
            self._say(
                f"no held-out loss: data.heldout_fraction={config.data.heldout_fraction} holds no clip out; raise it, "
                "or set validation.every_steps=null"
            )
            return None
        return Validation(config.validation, heldout_plan(config, self.data), self.data.reader, self.ranks)

    def run(self) -> bool:
        """Train to the end or to a signal, and save. Collective.

        Returns:
            Whether the run is complete.
        """
        config = self.config
        if self.state.step > config.max_steps:
            self._say(
                f"the run is already at step {self.state.step}, beyond max_steps={config.max_steps}; nothing to do"
            )
            return True
        self._say_start()
        if config.checkpoint.save_at_start and self.saver.saved_step is None:
            self._begin_to_save()
        step = self.state.step
        metrics = on_main(self.ranks, lambda: MetricsLog(config.run_dir, config.logging, config.max_steps, step))
        try:
            while not (self._is_complete() or self.stopping):
                if self.guard.must_roll_back(self.state.guard):
                    self._roll_back(metrics)
                self._run_epoch(metrics)
            complete = self._is_complete()
            self._save_at_end(complete)
        finally:
            self.watchdog.enter("close")
            self.profiler.close()
            if metrics is not None:
                metrics.close()
        who = self.stop.signal_name or "a signal to another rank"
        end = "complete" if complete else f"stopped by {who}; run the same command again to resume"
        self._say(f"step {self.state.step} of {config.max_steps}: {end}")
        return complete

    def _save_at_end(self, complete: bool) -> None:
        """Save the last step, before anything that may take long: a job that is stopped has little time. Collective."""
        self.watchdog.enter("save")
        saved_step = self.saver.wait()
        self.watchdog.enter("save")
        if saved_step != self.state.step:
            try:
                self.saver.save(self.state.step, self.state.to_json())
            except CheckpointError:
                if complete:
                    raise  # a run that was stopped comes again and makes the lost steps from the checkpoint before

    def _is_complete(self) -> bool:
        return self.state.step >= self.config.max_steps and not self.guard.must_roll_back(self.state.guard)

    def _roll_back(self, metrics: MetricsLog | None) -> None:
        """Go back to the last checkpoint before the skipped steps, and save without their clips. Collective."""
        self.watchdog.enter("rollback")
        config = self.config
        self.saver.wait()
        self.watchdog.enter("rollback")
        self.state = roll_back(config.guard, config.run_dir, self.guard, self.shards, self.state, self.ranks, self._say)
        self.plan, self.saver.saved_step, step = self.data.plan, None, self.state.step
        if self.ranks.is_main:
            self._set_aside_newer(step)
        on_main(self.ranks, lambda: metrics.rewind(step) if metrics else None)
        self.save_is_due = False
        with suppress(CheckpointError):  # the saver warns of it; a kill then makes the run decide again
            self.saver.save(step, self.state.to_json())

    def _run_epoch(self, metrics: MetricsLog | None) -> None:
        """Steps from the cursor to the end of its epoch, of the run, or to a signal."""
        config, state = self.config, self.state
        self.plan = run_on_all_ranks(lambda: plan_of(state, self.plan))
        loader = PackLoader(
            self.plan,
            self.data.reader,
            self.ranks.rank,
            self.ranks.world_size,
            state.cursor,
            config.data.num_workers,
            config.data.prefetch_steps,
            state.left_out_of_epoch(),
        )
        self.watchdog.waiting_for = loader.waiting_for
        speed = Speed(self.ranks.world_size, self.peak.tflops if self.peak else None)
        self.watchdog.enter("data", state.step + 1)
        for batch in loader:
            values = self._step(batch, data_wait_s=speed.lap_s())
            values |= speed.end_step(
                values["clips"], values["tokens"], batch.step_plan.flops, config.max_steps - state.step
            )
            if self.validation and self._is_due(config.validation.every_steps):
                values |= self._validate(self.validation)
            values |= self.saver.poll()
            self.profiler.end_step(state.step)
            if metrics is not None:
                metrics.write({"step": state.step, "epoch": batch.cursor.epoch} | values)
            if self.sampler and self._is_due(config.samples.every_steps):
                self._sample(self.sampler, metrics)
            if state.step >= config.max_steps or self.stopping or self.guard.must_roll_back(state.guard):
                return
            self.save_is_due |= state.step % config.checkpoint.save_every_steps == 0
            if self.save_is_due and not self.guard.may_roll_back(state.guard):
                self._begin_to_save()
            speed.restart()
            self.watchdog.enter("data", state.step + 1)

    def _is_due(self, every_steps: int | None) -> bool:
        """Whether the step just done is one of these; nothing is due in a job that stops."""
        return every_steps is not None and self.state.step % every_steps == 0 and not self.stopping

    def _step(self, batch: StepBatch, data_wait_s: float) -> dict[str, Any]:
        """One optimizer step, its EMA and its bookkeeping. Returns metrics, the same on all ranks."""
        config, state, plan = self.config, self.state, batch.step_plan
        lr = learning_rate(config.optim, state.step, config.max_steps)
        self.shards.set_learning_rate(lr)
        insertion_weight = config.process.insertion_loss_weight
        result = run_micro_steps(self.engine, batch, self.ranks, insertion_weight, self.watchdog.enter)
        self.watchdog.enter("optimizer")
        own = [result.velocity_sum, result.insertion_sum, data_wait_s, self.stop.is_set]
        own += [len(batch.quarantined), sum(bad.tokens for bad in batch.quarantined)]
        own += [peak_memory_gib(self.ranks.device), *result.observed]
        columns = list(zip(*gather_rows(own, self.ranks), strict=True))
        velocity_sums, insertion_sums, waits, stops, bad, bad_tokens, memory, *observed = columns
        self.stopping = any(stops)
        clips, tokens = plan.clips - int(sum(bad)), plan.tokens - int(sum(bad_tokens))
        refuse = self.guard.refusal(state.guard, [*velocity_sums, *insertion_sums], clips)
        outcome = optimizer_step(self.engine, config.optim.clip_grad_norm, refuse, self.ranks.device)
        if outcome.applied:
            self.shards.update_ema(decay_at(config.ema, state.step))
        if clips < plan.clips:
            self._quarantine(batch)
        state.advance(batch.next_cursor, clips, tokens)
        loss_by_rank = [
            velocity / plan.velocity_denominator + insertion_weight * insertion / plan.insertion_denominator
            for velocity, insertion in zip(velocity_sums, insertion_sums, strict=True)
        ]
        state.skipped_steps += self.guard.note(
            state.guard, state.step, batch, outcome, loss_by_rank, result.not_finite, self.plan.keys
        )
        velocity_loss = sum(velocity_sums) / plan.velocity_denominator
        insertion_loss = sum(insertion_sums) / plan.insertion_denominator
        return {
            "loss": velocity_loss + insertion_weight * insertion_loss,
            "loss/velocity": velocity_loss,
            "loss/insertion": insertion_loss,
            "lr": lr,
            "grad_norm": outcome.grad_norm,
            "skipped_steps": state.skipped_steps,
            "bad_clips": plan.clips - clips,
            "clips": clips,
            "tokens": tokens,
            "fill": plan.fill,
            "flops_imbalance": plan.flops_imbalance,
            "flops": plan.flops,
            "attention_ratio": plan.attention_ratio,
            "attention_ratio_expected": self.expected_attention_ratio,
            "data_wait_s": max(waits),
            "peak_memory_gib": max(memory),
            **observed_metrics([sum(column) for column in observed]),
        }

    def _quarantine(self, batch: StepBatch) -> None:
        """List all ranks' bad clips of a step; too many are a fault of the storage. Collective.

        Raises:
            DataError: On all ranks, if no clip of a full step could be read, or more of the epoch's than allowed.
        """
        known = self.state.guard.quarantine
        own = [(bad.key, bad.reason) for bad in batch.quarantined if bad.key not in known]
        found = [pair for pairs in gather_values(own) for pair in pairs]
        for key, reason in found:
            self.state.quarantine[key] = reason
            self._say(f"clip {key} is left out from the next epoch on: {reason}")
        in_epoch, allowed, plan = self.state.bad_clips_of_epoch(), self.config.data.max_bad_clips, batch.step_plan
        if len(found) == plan.clips and batch.next_cursor.epoch == plan.epoch:  # an epoch's last step may be one clip
            what = f"none of the {plan.clips} clips of step {plan.step} of epoch {plan.epoch} could be read"
        elif allowed is not None and in_epoch > allowed:
            what = f"{in_epoch} clips of epoch {plan.epoch} could not be read, more than data.max_bad_clips={allowed}"
        else:
            return
        stores = " and ".join(share.path for share in self.config.data.sets)
        raise mark_on_all_ranks(DataError(f"{what}; check the storage of {stores}. The last: {found[-1][1]}"))

    def _validate(self, validation: Validation) -> dict[str, float]:
        """Held-out loss of the EMA weights."""
        self.shards.swap_ema()
        with self.watchdog.each_forward(self.engine, "validation"):
            result = validation.run(self.engine)
        self.shards.swap_ema()
        return result

    def _sample(self, sampler: ClipSampler, metrics: MetricsLog | None) -> None:
        """Clips of the EMA weights."""
        self.shards.swap_ema()
        with self.watchdog.each_forward(self.engine, "samples"):
            picture = take_samples(sampler, self.engine, self.state.step, self.ranks)
        self.shards.swap_ema()
        if picture is not None and metrics is not None:
            self._say(f"samples of step {self.state.step}: {picture}")
            metrics.show("samples", picture, self.state.step)

    def _begin_to_save(self) -> None:
        self.save_is_due = False
        self.watchdog.enter("save")
        self.saver.begin(self.state.step, self.state.to_json())

    def _say_start(self) -> None:
        config, plan = self.config, self.data.plan
        two_part = build_delay_law(config.process.delay_law).two_part
        effective = effective_sample_ratio(config.process.insertion_share) if two_part else 1.0
        parameters = sum(math.prod(shape) for shape in self.shards.parameter_shapes.values())
        self._say(
            f"{len(plan.rows):,} clips, {parameters:,} parameters, {self.ranks.world_size} ranks x {self.micro_steps} "
            f"packs of {config.plan.token_budget} tokens, ZeRO-{config.zero.stage}, {config.precision}, expected "
            f"attention ratio {self.expected_attention_ratio:.3f}, effective sample ratio {effective:.2f}"
        )
        known = f"{self.peak.tflops:g} TFLOP/s a rank ({self.peak.source})" if self.peak else None
        self._say(f"MFU refers to {known}" if known else "no MFU: no peak is known here; logging.peak_tflops sets one")
        text_width = self.data.reader.text_width
        if text_width is not None and plan.spec.text_dim is None:
            self._say(f"the set's text is not used: the model has none; set model.text_dim={text_width} to use it")
        if two_part and config.process.insertion_share == 1:
            self._say("insertion_share is 1: no state after the clock's end is trained, which is another objective")

    def _say(self, line: str) -> None:
        if self.ranks.is_main:
            print(line, flush=True)

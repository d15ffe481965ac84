"""The training job, in reading order: open the data, build, resume, loop, save."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch

from flowception import run_directory
from flowception.config import dump
from flowception.data.loader import PackLoader, StepBatch
from flowception.data.step_plan import check_world_size
from flowception.errors import CheckpointError
from flowception.flow.delays import build_delay_law
from flowception.flow.prior import effective_sample_ratio
from flowception.nn.build import build_backbone
from flowception.nn.init import initialize
from flowception.training import resume
from flowception.training.checkpointer import Saver
from flowception.training.config import TrainConfig
from flowception.training.data import (
    TrainingData,
    heldout_plan,
    log_what_is_not_used,
    mean_attention_ratio,
    mean_log_rate,
    open_data,
)
from flowception.training.distributed.collectives import Ranks, on_main, run_on_all_ranks
from flowception.training.distributed.sharded_state import ShardedState
from flowception.training.distributed.watchdog import Watchdog
from flowception.training.distributed.zero import build_engine, deepspeed_config, optimizer_step
from flowception.training.ema import decay_at
from flowception.training.estimate.recomputation import settle_recomputation
from flowception.training.guard import Guard
from flowception.training.hardware import find_peak
from flowception.training.metrics import MetricsLog, Speed, check_packages
from flowception.training.optim import build_optimizer, learning_rate
from flowception.training.profiler import StepProfiler
from flowception.training.rollback import roll_back
from flowception.training.run_state import RunState, note_bad_clips, plan_of
from flowception.training.samples import StepSampler, take_samples
from flowception.training.signals import StopFlag
from flowception.training.step import run_micro_steps, step_metrics, summarize_step
from flowception.training.validation import Validation

logger = logging.getLogger(__name__)

SamplerFactory = Callable[[TrainConfig, TrainingData, Ranks], StepSampler]
"""Builds the sampler. ``train/main.py`` passes it in, because training does not import generation."""


def train(config: TrainConfig, ranks: Ranks, stop: StopFlag, make_sampler: SamplerFactory | None = None) -> bool:
    """Train until ``max_steps`` or a signal. The same call resumes. Collective.

    Args:
        config: The run.
        ranks: This rank.
        stop: Set by a signal.
        make_sampler: Builds the sampler of ``samples.every_steps``; None does not sample.

    Returns:
        True if the run is complete, False if it was stopped.
    """
    run_on_all_ranks(lambda: check_world_size(config.plan.packs_per_step, ranks.world_size))
    run_on_all_ranks(lambda: config.zero.check_world_size(ranks.world_size))
    run_on_all_ranks(lambda: config.profile.check_world_size(ranks.world_size))
    on_main(ranks, lambda: check_packages(config.logging))
    with on_main(ranks, lambda: run_directory.lock(config.run_dir)) or nullcontext():
        data = run_on_all_ranks(lambda: open_data(config))
        if config.model.initial_log_rate is None:
            config.model = replace(config.model, initial_log_rate=mean_log_rate(data.plan))
        settle_recomputation(config, ranks)
        manifest = run_directory.describe(config.model, data.reader.meta) if ranks.is_main else {}
        on_main(ranks, lambda: run_directory.check(config.run_dir, manifest))
        with Watchdog(
            config.run_dir,
            ranks,
            hang_timeout_s=config.guard.hang_timeout_s,
            data_stall_warning_s=config.guard.data_stall_warning_s,
        ) as watchdog:
            with watchdog.phase("start"):
                trainer = Trainer(config, ranks, data, stop, watchdog, make_sampler)
            try:
                on_main(ranks, lambda: run_directory.write(config.run_dir, dump(config), manifest))
                return trainer.run()
            finally:
                with watchdog.phase("save"):
                    trainer.saver.close()


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
        """Build the engine, and resume or initialize the run. Collective."""
        self.config, self.ranks, self.data = config, ranks, data
        self.stop, self.watchdog = stop, watchdog
        self.stopping, self.save_is_due = False, False

        self.micro_steps = -(-config.plan.packs_per_step // ranks.world_size)
        self.engine = self._build_engine()
        self.shards = ShardedState(self.engine)

        self.guard = Guard(config.guard, config.run_dir, ranks)
        self.saver = Saver(config.run_dir, config.checkpoint, self.shards)
        self.state = self._resume() or self._start()
        self.plan = run_on_all_ranks(lambda: plan_of(self.state, data.plan))

        self.validation = run_on_all_ranks(self._prepare_validation)
        self.sampler = run_on_all_ranks(lambda: make_sampler(config, data, ranks)) if make_sampler else None
        self.profiler = StepProfiler(config.profile, config.run_dir, ranks.rank)
        self.peak = find_peak(config.logging.peak_tflops, config.precision, ranks.device)
        self.expected_attention_ratio = mean_attention_ratio(config, data.plan)

    def _build_engine(self) -> Any:
        config, device = self.config, self.ranks.device
        clip_grad_norm = config.optim.clip_grad_norm
        return build_engine(
            lambda: build_backbone(config.model),
            lambda model: build_optimizer(model, config.optim, device),
            deepspeed_config(config.zero, config.precision, self.micro_steps, clip_grad_norm, device),
            device,
        )

    def _resume(self) -> RunState | None:
        config = self.config
        state = resume.load_newest(config.run_dir, self.shards)
        if state is not None:
            self.saver.saved_step = state.step
            logger.info("resuming %s at step %d of %d", config.run_dir, state.step, config.max_steps)
            resume.set_aside_newer(config.run_dir, state.step, self.ranks)
        return state

    def _start(self) -> RunState:
        config = self.config
        if config.init_from is not None:
            resume.load_initial_weights(config.init_from, self.shards, self.data.reader.meta, self.ranks)
        else:
            with torch.device("meta"):
                blueprint = build_backbone(config.model)
            self.shards.initialize(blueprint, lambda model, gather: initialize(model, config.seed, gather))
        return RunState()

    def _prepare_validation(self) -> Validation | None:
        config = self.config
        if config.validation.every_steps is None:
            return None
        if not len(self.data.heldout_rows):
            logger.info(
                "no held-out loss: data.heldout_fraction=%s holds out no clip; raise it, or set "
                "validation.every_steps=null",
                config.data.heldout_fraction,
            )
            return None
        return Validation(config.validation, heldout_plan(config, self.data), self.data.reader, self.ranks)

    def run(self) -> bool:
        """Train to the end or until a signal, and save. Collective.

        Returns:
            Whether the run is complete.
        """
        config, first_step = self.config, self.state.step
        if first_step > config.max_steps:
            logger.info(
                "the run is already at step %d, beyond max_steps=%d; nothing to do", first_step, config.max_steps
            )
            return True
        self._log_start()
        if config.checkpoint.save_at_start and self.saver.saved_step is None:
            self._begin_to_save()
        metrics = on_main(self.ranks, lambda: MetricsLog(config.run_dir, config.logging, config.max_steps, first_step))
        try:
            while not (self._is_complete() or self.stopping):
                if self.guard.must_roll_back(self.state.guard):
                    self._roll_back(metrics)
                self._run_epoch(metrics)
            complete = self._is_complete()
            self._save_at_end(complete)
        finally:
            with self.watchdog.phase("close"):
                self.profiler.close()
                if metrics is not None:
                    metrics.close()
        who = self.stop.signal_name or "a signal to another rank"
        end = "complete" if complete else f"stopped by {who}; run the same command again to resume"
        logger.info("step %d of %d: %s", self.state.step, config.max_steps, end)
        return complete

    def _is_complete(self) -> bool:
        return self.state.step >= self.config.max_steps and not self.guard.must_roll_back(self.state.guard)

    def _run_epoch(self, metrics: MetricsLog | None) -> None:
        """Train from the cursor to the end of the epoch or the run, or until a signal or a rollback. Collective."""
        config, state = self.config, self.state
        with self.watchdog.phase("plan"):
            self.plan = run_on_all_ranks(lambda: plan_of(state, self.plan))
        speed = Speed(self.ranks.world_size, self.peak.tflops if self.peak else None)
        for batch in self._batches():
            values = self._step(batch, data_wait_s=speed.lap_s())
            steps_left = config.max_steps - state.step
            values |= speed.end_step(values["clips"], values["tokens"], batch.step_plan.flops, steps_left)
            if self.validation and self._is_due(config.validation.every_steps):
                values |= self._validate(self.validation)
            with self.watchdog.phase("metrics"):
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

    def _batches(self) -> Iterator[StepBatch]:
        """Yield this rank's packs for each step of the epoch, from the cursor on."""
        data, state = self.config.data, self.state
        loader = PackLoader(
            self.plan,
            self.data.reader,
            self.ranks.rank,
            self.ranks.world_size,
            state.cursor,
            data.num_workers,
            data.prefetch_steps,
            state.skipped_in_epoch(),
        )
        self.watchdog.waiting_for = loader.waiting_for
        batches = iter(loader)
        while True:
            with self.watchdog.phase("data", state.step + 1):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _is_due(self, every_steps: int | None) -> bool:
        """Whether the step just done is a multiple of the interval; always False in a job that is stopping."""
        return every_steps is not None and self.state.step % every_steps == 0 and not self.stopping

    def _step(self, batch: StepBatch, data_wait_s: float) -> dict[str, Any]:
        """Run one optimizer step with its EMA update. Collective. Returns metrics, the same on all ranks."""
        config, state, ranks = self.config, self.state, self.ranks
        lr = learning_rate(config.optim, state.step, config.max_steps)
        self.shards.set_learning_rate(lr)
        insertion_loss_weight = config.process.insertion_loss_weight
        own = run_micro_steps(self.engine, batch, ranks, insertion_loss_weight, self.watchdog.phase)
        with self.watchdog.phase("optimizer"):
            stop = self.stop.is_set
            step = summarize_step(own, batch, ranks, insertion_loss_weight, data_wait_s=data_wait_s, stop=stop)
            self.stopping = step.stop
            refuse = self.guard.refusal(state.guard, step.loss_sums, step.clips)
            outcome = optimizer_step(self.engine, config.optim.clip_grad_norm, refuse, ranks.device)
            if outcome.applied:
                self.shards.update_ema(decay_at(config.ema, state.step))
            if step.clips < batch.step_plan.clips:
                note_bad_clips(state, batch, config.data)
            state.advance(batch.next_cursor, step.clips, step.tokens)
            state.skipped_steps += self.guard.note(
                state.guard, state.step, batch, outcome, step.loss_by_rank, own.not_finite, self.plan.keys
            )
        return step_metrics(
            step,
            batch.step_plan,
            lr=lr,
            grad_norm=outcome.grad_norm,
            skipped_steps=state.skipped_steps,
            expected_attention_ratio=self.expected_attention_ratio,
        )

    def _validate(self, validation: Validation) -> dict[str, float]:
        """Measure the held-out loss of the EMA weights. Collective."""
        with self.watchdog.each_forward(self.engine, "validation"), self.shards.ema_weights():
            return validation.run(self.engine)

    def _sample(self, sampler: StepSampler, metrics: MetricsLog | None) -> None:
        """Sample clips from the EMA weights. Collective."""
        step = self.state.step
        with self.watchdog.each_forward(self.engine, "samples"), self.shards.ema_weights():
            picture = take_samples(sampler, self.engine, step, self.ranks)
        if picture is not None and metrics is not None:
            logger.info("samples of step %d: %s", step, picture)
            metrics.show("samples", picture, step)

    def _begin_to_save(self) -> None:
        self.save_is_due = False
        with self.watchdog.phase("save"):
            self.saver.begin(self.state.step, self.state.to_json())

    def _save_at_end(self, complete: bool) -> None:
        """Save the last step. A stopped job has little time, so nothing slow runs before this. Collective."""
        with self.watchdog.phase("save"):
            saved_step = self.saver.wait()
        if saved_step == self.state.step:
            return
        try:
            with self.watchdog.phase("save"):
                self.saver.save(self.state.step, self.state.to_json())
        except CheckpointError:
            if complete:
                raise  # a stopped run resumes from the previous checkpoint and repeats the lost steps

    def _roll_back(self, metrics: MetricsLog | None) -> None:
        """Roll back to the last checkpoint before the skipped steps, and save without their clips. Collective."""
        config, ranks = self.config, self.ranks
        with self.watchdog.phase("save"):
            self.saver.wait()
        with self.watchdog.phase("rollback"):
            self.state = roll_back(config.guard, config.run_dir, self.guard, self.shards, self.state, ranks)
            self.plan, self.saver.saved_step, self.save_is_due = self.data.plan, None, False
            step = self.state.step
            on_main(ranks, lambda: metrics.rewind(step) if metrics else None)
            with suppress(CheckpointError):  # the saver logs a warning; after a kill the run decides again
                self.saver.save(step, self.state.to_json())

    def _log_start(self) -> None:
        config, plan = self.config, self.data.plan
        two_part = build_delay_law(config.process.delay_law).two_part
        effective = effective_sample_ratio(config.process.insertion_share) if two_part else 1.0
        parameters = sum(math.prod(shape) for shape in self.shards.parameter_shapes.values())
        logger.info(
            f"{len(plan.rows):,} clips, {parameters:,} parameters, {self.ranks.world_size} ranks x {self.micro_steps} "
            f"packs of {config.plan.token_budget} tokens, ZeRO-{config.zero.stage}, {config.precision}, expected "
            f"attention ratio {self.expected_attention_ratio:.3f}, effective sample ratio {effective:.2f}"
        )
        if self.peak:
            logger.info("MFU is relative to %g TFLOP/s per rank (%s)", self.peak.tflops, self.peak.source)
        else:
            logger.info("no MFU: the peak of this device is unknown; set logging.peak_tflops")
        log_what_is_not_used(config, self.data)

"""Samples drawn during training, conditioned on held-out clips.

Each sample uses the task, context frames, class and text that the run's laws draw for one held-out clip. They are the
same every time, so samples of different steps can be compared. Clip i is the same for any number of ranks.

Shape legend: ``n`` latent frames of a held-out clip, ``C, h, w`` of one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowception.codecs.video_file import read_video
from flowception.data.plan import Plan
from flowception.data.step_plan import PackPlan
from flowception.errors import DataError, FlowceptionError
from flowception.files import write_atomically
from flowception.flow import TASKS, Context, Role, SamplerConfig, SampleResult, SamplerState, sample
from flowception.flow.delays import build_delay_law
from flowception.generation.load import codec_of, data_fps
from flowception.generation.predictor import NetworkPredictor
from flowception.generation.video import DEFAULT_FPS, write_contact_sheet, write_mp4
from flowception.progress import EVERY_RANK
from flowception.run_directory import RunConfig
from flowception.shards.open import DataReader
from flowception.shards.schema import NO_CLASS

logger = logging.getLogger(__name__)


class _Given(NamedTuple):
    """Condition that a held-out clip provides for a sample."""

    row: int
    task: str
    context: Context | None
    text: Tensor | None


class TrainingSampler:
    """One rank's share of the samples."""

    def __init__(
        self,
        config: RunConfig,
        reader: DataReader,
        plan: Plan,
        *,
        folder: Path,
        num_clips: int,
        num_inference_steps: int,
        max_frames: int,
        guidance: float | None,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        """Choose the held-out clips that provide the conditions.

        Args:
            config: Configuration of the run.
            reader: Reader of the shard set.
            plan: Plan of the clips that provide tasks, context and conditions.
            folder: Folder in which each step gets a folder for its clips.
            num_clips: Number of clips over all ranks.
            num_inference_steps: Evaluations of a frame from noise to data.
            max_frames: Cap on latent frames of a clip.
            guidance: Classifier-free guidance on the velocity; None is off.
            rank: Rank of this process.
            world_size: Number of ranks.
            device: Device of the network.

        Raises:
            DataError: If none of the clips can be read.
        """
        self.config, self.reader, self.device, self.folder = config, reader, device, folder
        self.num_clips, self.num_inference_steps = num_clips, num_inference_steps
        self.max_frames, self.guidance = max_frames, guidance
        self.law = build_delay_law(config.process.delay_law)
        self.fps = data_fps(config.data) or DEFAULT_FPS
        clips = plan.index.clips
        grids = np.stack([clips["height"][plan.rows], clips["width"][plan.rows]], axis=1)
        kinds, which, counts = np.unique(grids, axis=0, return_inverse=True, return_counts=True)
        rows = plan.rows[which.reshape(-1) == counts.argmax()].astype(np.int64)
        self.grid = (int(kinds[counts.argmax()][0]), int(kinds[counts.argmax()][1]))
        per_rank = -(-num_clips // world_size)
        self.numbers = range(rank * per_rank, (rank + 1) * per_rank)
        self.given = [self._first_readable(plan, np.roll(rows, -number)) for number in self.numbers]
        self.lengths = [int(clips["frames"][given.row]) for given in self.given]
        labeled = config.model.num_classes > 0
        self.labels = [int(clips["class_label"][given.row]) if labeled else NO_CLASS for given in self.given]

    def _first_readable(self, plan: Plan, rows: NDArray[np.int64]) -> _Given:
        """Condition from the first readable clip."""
        for row in rows.tolist():
            try:
                return self._read(plan, row)
            except DataError as error:
                logger.warning("cannot read a held-out clip for samples, trying the next (%s)", error, extra=EVERY_RANK)
        raise DataError(
            f"cannot read any of {len(rows)} clips for samples; check the storage, or unset samples.every_steps"
        )

    def _read(self, plan: Plan, row: int) -> _Given:
        """Condition from one clip: context frames by the roles drawn for it, and its text."""
        draws = plan.clip_draws(PackPlan(0, 0, np.array([row]), np.zeros(1, dtype=np.int64))).clips
        roles = draws.roles[0, : int(plan.index.clips["frames"][row])]
        task = TASKS[int(draws.task[0])].name
        active, passive = roles == Role.CONTEXT_ACTIVE, roles == Role.CONTEXT_PASSIVE
        places = torch.nonzero(active | passive).flatten()
        latents, text = self.reader.read_clip(row, places.numpy())
        if not len(places):
            return _Given(row, task, None, text)
        starts = torch.nonzero(roles == Role.START).flatten()
        context = Context(
            frames=latents.float().to(self.device),
            active=active[places],
            num_start_frames=None if (starts > places[0]).any() else 0,
            begins_with_start=bool(roles[0] == Role.START),
            places=places.tolist(),
        )
        return _Given(row, task, context, text)

    def sample(self, model: nn.Module, step: int) -> list[dict[str, Any]]:
        """Sample and write this rank's clips; every rank calls ``model`` the same number of times.

        Args:
            model: The network in evaluation mode.
            step: Completed optimizer steps.

        Returns:
            One record of ``clips.jsonl`` per clip written; empty if decoding or writing failed, which is logged.
        """
        predictor = _EqualEvaluations(NetworkPredictor(model, self.labels, **self._conditions()))
        result = sample(
            predictor,
            frame_shape=(self.reader.latent_channels, *self.grid),
            batch_size=len(self.numbers),
            config=self._sampler_config(),
            context=[given.context for given in self.given],
            seed=self.numbers[0],
            device=self.device,
            num_frames=None if self.law.inserts else self.lengths,
        )
        predictor.fill(self._most_evaluations())
        mine = [number for number in self.numbers if number < self.num_clips]
        try:
            return self._write(result, mine, step)
        except (FlowceptionError, OSError, torch.OutOfMemoryError) as error:
            text = "cannot write the samples of step %d (%s); training continues"
            logger.warning(text, step, error, extra=EVERY_RANK)
            return []

    def _conditions(self) -> dict[str, Any]:
        config, null_text = self.config, self.reader.null_text
        if config.model.spec().text_dim is None or null_text is None:
            return {"guidance": self.guidance}
        texts = [(null_text if given.text is None else given.text).float() for given in self.given]
        return {"guidance": self.guidance, "texts": texts, "null_text": null_text.float()}

    def _sampler_config(self) -> SamplerConfig:
        config = self.config
        return SamplerConfig(
            num_inference_steps=self.num_inference_steps,
            num_start_frames=config.process.num_start_frames,
            order="learned" if self.law.inserts else config.process.delay_law,
            insertion_schedule=config.process.insertion_schedule,
            insertion_exponent=config.process.insertion_exponent,
            max_frames=max(self.max_frames, *self.lengths),
            time_shift=config.process.time_shift,
        )

    def _most_evaluations(self) -> int:
        """Upper bound on the evaluations of any rank's batch, from the longest clip of the set."""
        longest = int(self.reader.index.clips["frames"].max())
        clock_end = float(self.law.clock_end(torch.full((1, longest), int(Role.FREE))))
        return round(clock_end * self.num_inference_steps)

    def _write(self, result: SampleResult, numbers: list[int], step: int) -> list[dict[str, Any]]:
        if not numbers:
            return []
        folder = self.folder / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        codec = codec_of(self.reader.meta, self.device)
        videos = codec.decode_many([latents.cpu() for latents in result.clips()[: len(numbers)]])
        records = []
        for slot, (number, video) in enumerate(zip(numbers, videos)):
            given = self.given[slot]
            name = f"clip_{number:04d}.mp4"
            write_mp4(folder / name, np.asarray(video), fps=self.fps)
            records.append(
                {
                    "file": name,
                    "step": step,
                    "task": given.task,
                    "of": self.reader.index.key(given.row),
                    "class_label": None if self.labels[slot] == NO_CLASS else self.labels[slot],
                    "frames": len(video),
                    "latent_frames": int(result.cu_frames[slot + 1] - result.cu_frames[slot]),
                    "seed": number,
                }
            )
        return records

    def join(self, step: int, records: list[dict[str, Any]]) -> Path | None:
        """Write ``clips.jsonl`` and ``contact.png`` of all ranks' clips.

        Returns:
            The contact sheet; None if there is no clip or writing failed, which is logged.
        """
        if not records:
            return None
        folder = self.folder / f"step_{step:08d}"
        try:
            write_atomically(folder / "clips.jsonl", "".join(json.dumps(record) + "\n" for record in records))
            videos = [read_video(folder / record["file"]) for record in records]
            labels = [f"{record['seed']} {record['task']} of {record['of']}" for record in records]
            write_contact_sheet(folder / "contact.png", videos, labels)
        except (FlowceptionError, OSError) as error:
            logger.warning("cannot join the samples of step %d (%s); training continues", step, error)
            return None
        return folder / "contact.png"


class _EqualEvaluations:
    """A predictor that can be padded to a number of evaluations by evaluating its first state again."""

    def __init__(self, predictor: Callable[[SamplerState], tuple[Tensor, Tensor]]) -> None:
        self._predictor, self.evaluations = predictor, 0
        self._first: SamplerState | None = None

    def __call__(self, state: SamplerState) -> tuple[Tensor, Tensor]:
        self._first = self._first or state
        self.evaluations += 1
        return self._predictor(state)

    def fill(self, total: int) -> None:
        while self._first is not None and self.evaluations < total:
            self(self._first)

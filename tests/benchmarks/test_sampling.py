"""``benchmarks/sampling.py``: scores of known laws, costs by hand, and the full benchmark on a tiny run."""

import json

import numpy as np
import pytest
import torch

from benchmarks import gaussian_clips, sampling
from flowception.evaluation.toy.world import draw_clip
from flowception.flow import SampleResult
from flowception.generation.load import load_run
from flowception.progress import Progress
from flowception.shards.reader import ShardReader


def result_of(clips):
    """A finished result with clips [n, C]."""
    sizes = torch.tensor([len(clip) for clip in clips])
    frames = torch.cat([torch.as_tensor(clip) for clip in clips]).float()[:, :, None, None]
    return SampleResult(
        frames=frames, cu_frames=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), born_at=torch.zeros(len(frames)),
        roles=torch.zeros(len(frames)), evaluations=1, clip_flops=None, capped=torch.zeros(len(clips)), history=None,
    )  # fmt: skip


def test_true_gaussian_clips_score_at_the_noise_floor():
    generator = np.random.default_rng(0)
    clips = [clip for n in (4, 8) for clip in gaussian_clips.draw_clips(2000, n, generator)]
    score = sampling.score_gaussian([result_of(clips[:3000]), result_of(clips[3000:])])
    assert score["frechet"] < 2 * score["frechet_of_sampling"] < 0.01
    assert score["length_total_variation"] == 0
    # Independent frames with the correct variance: closed-form distance of the identity from the law.
    values = np.linalg.eigvalsh(gaussian_clips.covariance(4))
    lone = sampling.score_gaussian([result_of([generator.standard_normal((4, 3)) for _ in range(20_000)])])
    assert lone["frechet_by_length"]["4"] == pytest.approx(((1 - np.sqrt(values)) ** 2).sum(), rel=0.05)
    assert np.isnan(lone["frechet_by_length"]["8"])
    assert lone["length_total_variation"] == pytest.approx(0.5)


def test_the_set_has_the_law_and_can_be_read(tmp_path):
    gaussian_clips.write_set(tmp_path, clips=6000, seed=3)
    reader = ShardReader(str(tmp_path))
    frames = reader.index.clips["frames"]
    assert (frames == 8).mean() == pytest.approx(0.5, abs=0.03)
    rows = np.flatnonzero(frames == 4)[:1500]
    values = torch.cat([reader.read(int(row), range(4)).float().flatten(1).T for row in rows]).numpy()
    assert np.abs(np.cov(values.T) - gaussian_clips.covariance(4)).max() < 0.06


def test_windows_are_consecutive_moves_without_gaps():
    track = np.array([[0.0, 0], [1, 10], [3, 30], [6, 60], [10, 100], [15, 150]])
    gap = track.copy()
    gap[1] = np.nan
    rows = sampling.windows([track, gap, track[:3]])
    assert rows.tolist() == [[1, 2, 3, 10, 20, 30], [2, 3, 4, 20, 30, 40], [3, 4, 5, 30, 40, 50], [3, 4, 5, 30, 40, 50]]


def test_the_world_has_no_distance_from_itself():
    world = sampling.WorldMoves.draw()
    tracks = [draw_clip(seed=5, number=number).positions for number in range(500)]
    assert world.distance(tracks) < 0.03
    assert 0.5 < world.distance_of_sampling(500) / world.distance(tracks) < 2
    still = [np.repeat(track[:1], len(track), axis=0) for track in tracks]
    assert world.distance(still) == pytest.approx(float(world.covariance.trace()), rel=0.05)


def test_full_sequence_sampling_has_the_cost_of_the_reference(make_run):
    run = load_run(make_run(delay_law="full_sequence"))
    setting = sampling.Setting("full_sequence", 4)
    with Progress(5, "sampling") as progress:
        batches = list(sampling.sample_clips(run, setting, 5, [3, 6, 3, 6, 6], 0, progress))
    assert sorted(len(clip) for result, _ in batches for clip in result.clips()) == [3, 3, 6, 6, 6]
    cost = sampling.cost(run, setting, [result for result, _ in batches])
    assert cost["flops_over_full_sequence"] == pytest.approx(1, rel=1e-12)
    assert cost["evaluations_per_clip"] == 4


def test_the_full_benchmark_on_a_tiny_run(make_run, tmp_path, capsys):
    json_path, picture = tmp_path / "a" / "sampling.json", tmp_path / "sampling.png"
    arguments = ["--steps", "4", "--refresh", "1", "2", "--quick", "--gaussian-clips", "5"]
    paths = ["--json", str(json_path), "--picture", str(picture)]
    assert sampling.main(["--gaussian", str(make_run()), *arguments, *paths]) == 0
    rows = json.loads(json_path.read_text())
    assert [(row["sampler"], row["cache_refresh_steps"]) for row in rows] == [
        ("plain", None), ("cached", 1), ("cached", 2), ("cached", 4), ("plain", None),
    ]  # fmt: skip
    plain, same, half, never, _ = rows
    assert plain["gflops_per_clip"] == same["gflops_per_clip"] > half["gflops_per_clip"] > never["gflops_per_clip"]
    assert same["rms_from_plain"] < 1e-5 < half["rms_from_plain"] < never["rms_from_plain"]
    assert picture.stat().st_size > 1000
    assert "cached, 4 steps, r = 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sampling.main([])


def test_cached_sampling_is_compared_with_plain_sampling_at_the_same_number_of_steps(make_run):
    settings = [sampling.Setting("plain", 4), sampling.Setting("plain", 2), sampling.Setting("cached", 2, 1)]
    rows = sampling.measure_run("gaussian", load_run(make_run()), settings, clips=4, seed=0)
    assert rows[2]["rms_from_plain"] < 1e-5
    assert rows[2]["gflops_per_clip"] == rows[1]["gflops_per_clip"] < rows[0]["gflops_per_clip"]

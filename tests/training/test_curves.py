import json

import numpy as np
import pytest
from matplotlib.image import imread

from flowception import cli
from flowception.errors import RunDirectoryError
from flowception.training.curves import PANELS, add_ratios, draw_curves, moving_mean, names_of, read_metrics


def line(step, **more):
    values = {"step": step, "loss": 1 / step, "loss/velocity": 1 / step, "loss/insertion": -0.5, "grad_norm": 2.0}
    values |= {
        "loss/velocity/0-0.25": 2.0,
        "loss/velocity/0.25-0.5": 1.0,
        "lr": 1e-4,
        "fill": 0.98,
        "tokens_per_s": 10.0,
    }
    values |= {"rate/predicted": 3.0, "rate/true": 4.0, "data_wait_s": 0.1, "step_s": 1.0, "attention_ratio": 0.7}
    return json.dumps(values | more)


def write(folder, lines):
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_curves_match_the_file_and_damaged_or_null_values_are_reported(tmp_path):
    lines = [line(1), line(2, loss=None), line(3), '{"step": 4, "lo', "[1]", line(6, **{"validation/loss": 0.25})]
    metrics = read_metrics(write(tmp_path, lines))
    assert metrics.curves["loss"].steps.tolist() == [1, 3, 6]
    assert metrics.curves["loss"].values.tolist() == [1, 1 / 3, 1 / 6]
    assert metrics.curves["validation/loss"].steps.tolist() == [6]
    assert metrics.last_step == 6
    assert metrics.notes == [
        "skipped 2 unreadable lines of metrics.jsonl",
        "loss is not a finite number in 1 steps",
        "2 steps between 1 and 6 are missing",
    ]


def test_a_complete_file_has_no_notes(tmp_path):
    assert read_metrics(write(tmp_path, [line(step) for step in range(1, 9)])).notes == []


def test_ratio_is_of_sums_so_steps_with_few_sites_have_little_weight(tmp_path):
    many = [line(step, **{"rate/predicted": 80.0, "rate/true": 100.0}) for step in range(1, 101)]
    many[49] = line(50, **{"rate/predicted": 8.0, "rate/true": 0.0})  # by itself its ratio is infinite
    metrics = read_metrics(write(tmp_path, many))
    add_ratios(metrics)
    ratio = metrics.curves["rate/predicted over rate/true"]
    assert len(ratio.values) == 100
    assert ratio.values[10] == pytest.approx(0.8)
    assert ratio.values[49] == pytest.approx(88 / 100)  # both are means over two steps


def test_moving_mean_of_known_values():
    assert moving_mean(np.array([1.0, 2.0, 6.0]), 1).tolist() == [1, 2, 6]
    assert moving_mean(np.array([1.0, 2.0, 6.0, 7.0]), 3).tolist() == [1.5, 3, 5, 6.5]


def test_a_panel_has_the_metrics_that_it_names(tmp_path):
    by_title = {panel.title: panel for panel in PANELS}
    known = ["loss", "loss/velocity", "loss/velocity/0-0.25", "loss/velocity/0.25-0.5", "validation/velocity/0.5"]
    assert names_of(by_title["loss by term"], known) == ["loss/velocity"]
    bins = next(panel for panel in PANELS if "frame time" in panel.title)
    assert names_of(bins, known) == ["loss/velocity/0-0.25", "loss/velocity/0.25-0.5"]
    assert names_of(by_title["model FLOPs utilization"], known) == []


def test_plot_draws_available_metrics_and_lists_missing_ones(tmp_path, capsys):
    write(tmp_path, [line(step) for step in range(1, 301)] + ["{"])
    assert cli.main(["plot", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "skipped 1 unreadable lines of metrics.jsonl" in said
    absent = next(text for text in said.splitlines() if text.startswith("not in metrics.jsonl"))
    assert "model FLOPs utilization" in absent
    assert "gradient norm" not in absent
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[1] == 1500
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20


def test_plot_fails_if_it_cannot_read_or_write(tmp_path, capsys):
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert "metrics.jsonl does not exist" in capsys.readouterr().err
    with pytest.raises(RunDirectoryError, match="no readable line"):
        read_metrics(write(tmp_path, ["{", ""]))
    with pytest.raises(RunDirectoryError, match="none of the metrics"):
        draw_curves(write(tmp_path, ['{"step": 1}']), tmp_path / "a.png")
    write(tmp_path, [line(1)])
    for wrong in (tmp_path / "no" / "a.png", tmp_path / "a.nothing"):
        with pytest.raises(RunDirectoryError, match="cannot write"):
            draw_curves(tmp_path, wrong)

import pytest
import torch
import yaml
from toy_set import write_config, write_set

from flowception.config import load_config
from flowception.errors import ConfigError
from flowception.nn import FlowceptionDiT, count_parameters
from flowception.nn.layout import ClipShape, PackInput, build_layout
from flowception.nn.presets import DiTConfig
from flowception.training.dry_run import report, world_sizes
from flowception.training.memory import KEPT_BYTES, memory_per_rank

GIB = 2**30


def kept_bytes(num_layers, arithmetic, width=128):
    """What autograd keeps for the backward pass of a pack, parameters left out; and the pack's tokens."""
    config = DiTConfig(preset=None, in_channels=8, hidden_size=width, num_layers=num_layers, num_heads=2)
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    model = FlowceptionDiT(config).initialise(0).to(dtype)
    layout = build_layout([ClipShape(8, 8, 8)] * 2)
    tokens, frames = layout.shape.token_budget, layout.shape.max_frames
    pack = PackInput(
        layout=layout,
        noisy=torch.zeros(tokens, 8),
        condition=torch.zeros(tokens, 8),
        time=torch.rand(frames),
        role=torch.zeros(frames, dtype=torch.int64),
        class_label=torch.full((2,), -1),
        text=None,
    )
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with keeping, torch.autocast("cpu", dtype=torch.bfloat16, enabled=arithmetic == "autocast"):
        model(pack)
    return sum(size for size, _ in kept.values()), tokens


@pytest.mark.parametrize("arithmetic", list(KEPT_BYTES))
def test_activation_estimate_is_what_autograd_keeps(arithmetic):
    (two, tokens), (four, _) = kept_bytes(2, arithmetic), kept_bytes(4, arithmetic)
    assert (four - two) / 2 / tokens / 128 == pytest.approx(KEPT_BYTES[arithmetic], rel=0.08)


def sizes(stage, world_size, precision="bf16"):
    spec = DiTConfig(preset="2b").flop_spec()
    return memory_per_rank(
        parameters=10**9,
        world_size=world_size,
        stage=stage,
        spec=spec,
        token_budget=1000,
        precision=precision,
        activation_checkpointing=True,
        bucket_elements=10**6,
        max_live_elements=10**8,
    )


def test_stages_shard_what_they_say():
    billion = 10**9
    assert (sizes(0, 8).optimizer, sizes(1, 8).optimizer, sizes(3, 8).optimizer) == (8 * billion, billion, billion)
    assert (sizes(0, 8).ema, sizes(1, 8).ema) == (4 * billion, billion / 2)
    assert sizes(1, 8).gradients > 4 * billion > 2 * sizes(2, 8).gradients
    assert sizes(2, 8).weights == 2 * billion + billion / 2  # bf16 copies of all, fp32 masters of an eighth
    assert sizes(3, 8).weights == 6 * billion / 8
    assert sizes(3, 8, "fp32").weights == billion / 2  # the masters are the weights
    assert sizes(3, 8).working_weights == 2 * 10**8
    totals = [sizes(stage, 8).total for stage in range(4)]
    assert totals == sorted(totals, reverse=True)
    assert sizes(3, 64).total < sizes(3, 8).total


@pytest.fixture
def config_path(tmp_path):
    return write_config(tmp_path / "c.yaml", tmp_path / "run", write_set(tmp_path / "shards"))


def test_dry_run_says_everything_and_starts_nothing(config_path, tmp_path):
    config = load_config([config_path])
    text = report(config, [1, 3])
    assert f"parameters: {count_parameters(config.model):,}" in text
    assert "37 clips, 4 steps per epoch" in text
    assert "packs per rank             3         1" in text
    assert yaml.safe_load(text.split("\n\n")[0])["max_steps"] == 12
    assert not (tmp_path / "run").exists()


def test_dry_run_without_data_and_with_too_many_ranks(config_path, tmp_path):
    config = load_config([config_path], [f"data.path={tmp_path / 'nowhere'}"])
    text = report(config, [8])
    assert "data not found" in text
    assert "refused" in text


def test_dry_run_of_two_billion_parameters(tmp_path):
    path = write_config(tmp_path / "c.yaml", tmp_path / "run", tmp_path / "nowhere", model={"preset": "2b"})
    config = load_config([path], ["precision=bf16"])
    text = report(config, [8, 64])
    parameters = int(text.split("parameters: ")[1].split(" ")[0].replace(",", ""))
    assert 2.0e9 < parameters < 2.2e9
    optimizer = next(line for line in text.splitlines() if line.startswith("optimizer"))
    assert [float(value) for value in optimizer.split()[1:]] == pytest.approx(
        [8 * parameters / 8 / GIB, 8 * parameters / 64 / GIB], abs=0.006
    )


def test_world_sizes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert world_sizes("") == [2, 8, 64]
    assert world_sizes("8,64") == [8, 64]
    for wrong in ("x", "0", "8,"):
        with pytest.raises(ConfigError, match="--world-size"):
            world_sizes(wrong)

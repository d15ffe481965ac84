"""Reading configurations: layers, errors with suggestions, and every file of configs/."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from data_prep.encoder.config import EncodeConfig
from flowception.config import dotted_keys, dump, load
from flowception.errors import ConfigError
from flowception.training.config import TrainConfig, load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SECTIONS = {key.split(".")[0] for key in dotted_keys(TrainConfig) if "." in key}
NEEDED = ["run_dir=r", "max_steps=10", "token_budget=512", "packs_per_step=2", "data.path=d"]


def leaves(path):
    """Dotted keys that a file sets."""

    def walk(found, prefix):
        for key, value in found.items():
            yield from walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    return list(walk(yaml.safe_load(path.read_text()), ""))


def values(config):
    """Value of every dotted key, as a dumped file has it."""
    dumped = OmegaConf.create(dump(config))
    return {key: OmegaConf.select(dumped, key) for key in dotted_keys(TrainConfig)}


def test_later_layers_win(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("optim: {lr: 0.5, warmup_steps: 7}\nseed: 1\n")
    second.write_text("optim: {lr: 0.25}\n")
    config = load_config([first, second], [*NEEDED, "seed=3"])
    assert (config.optim.lr, config.optim.warmup_steps, config.seed) == (0.25, 7, 3)


def test_numbers_on_the_command_line_are_numbers():
    config = load_config([], [*NEEDED, "optim.lr=1e-4", "model.text_dim=null"])
    assert config.optim.lr == pytest.approx(0.0001)
    assert config.model.text_dim is None


def test_a_named_mixture_replaces_the_default(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("tasks: {i2v: 1.0}\n")
    assert load_config([file], NEEDED).process.tasks == {"i2v": 1.0}
    overlay = tmp_path / "b.yaml"
    overlay.write_text("tasks: {t2v: 0.25}\n")
    assert load_config([file, overlay], NEEDED).process.tasks == {"t2v": 0.25}
    assert load_config([], [*NEEDED, "tasks.i2v=0.5"]).process.tasks == {"t2v": 1.0, "i2v": 0.5}
    assert load_config([], NEEDED).process.tasks == {"t2v": 1.0}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim.lrr=1"], r"^optim\.lrr=1: unknown key optim\.lrr; nearest: optim\.lr$"),
        (["token_buget=1"], "unknown key token_buget; nearest: token_budget$"),
        (["optim.learning_rate=1"], r"nearest: optim\.lr$"),
        (["learning_rate=1"], r"nearest: optim\.lr$"),
        (["heldout_fraction=0.1"], r"unknown key heldout_fraction; nearest: data\.heldout_fraction$"),
        (["data.token_budget=9"], "nearest: token_budget$"),
        (["optm.lr=1"], "unknown key optm; nearest: optim$"),
        (["checkpoint.every_steps=1"], r"nearest: checkpoint\.save_every_steps$"),
        (["zero=3"], "^zero=3: .*ZeroConfig"),
        (["precision=fp8"], "fp8"),
        (["max_steps=0"], "max_steps must be an integer >= 1, got 0"),
        (["zero.stage=4"], "zero.stage must be an integer from 0 to 3, got 4"),
        (["insertion_share=0"], r"insertion_share must be a number in \(0, 1\], got 0"),
        (["tasks.t3v=1"], "t3v"),
        (["optim.lr=fast"], r"^optim\.lr=fast: .* \(key optim\.lr\)$"),
        (["seed=-1"], "seed must be an integer from 0 to [0-9]+, got -1"),
        (["optim.lr=nan"], "optim.lr must be a number > 0, got nan"),
        (["seed"], "override must have the form key=value, got 'seed'"),
    ],
)
def test_errors_name_the_value(words, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config([], [*NEEDED, *words])


@pytest.mark.parametrize(
    ("save_timeout_s", "hang_timeout_s", "refused"),
    [(600, 1200, False), (1199, 1200, False), (1200, 1200, True), (600, 300, True), (1500, "null", False)],
)
def test_a_save_may_not_wait_until_the_watchdog_gives_up(save_timeout_s, hang_timeout_s, refused):
    words = [f"checkpoint.save_timeout_s={save_timeout_s}", f"guard.hang_timeout_s={hang_timeout_s}"]
    if not refused:
        load_config([], [*NEEDED, *words])
        return
    expected = (
        f"save_timeout_s must be less than guard.hang_timeout_s, got {save_timeout_s} and {hang_timeout_s}: the watch"
    )
    with pytest.raises(ConfigError, match=expected):
        load_config([], [*NEEDED, *words])


def test_an_unknown_key_names_its_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("optim: {weight_deca: 0.5}\n")
    with pytest.raises(ConfigError) as refusal:
        load_config([file], NEEDED)
    assert str(refusal.value) == f"{file}: unknown key optim.weight_deca; nearest: optim.weight_decay"


def test_missing_values_are_named():
    with pytest.raises(ConfigError, match="^max_steps has no value"):
        load_config([], [word for word in NEEDED if not word.startswith("max_steps")])
    with pytest.raises(ConfigError, match=r"data\.path has no value"):
        load_config([], [word for word in NEEDED if not word.startswith("data.path")])
    with pytest.raises(ConfigError, match="^configuration file nowhere.yaml does not exist; check the path$"):
        load_config(["nowhere.yaml"])


def test_broken_yaml_is_rejected(tmp_path):
    file = tmp_path / "a.yaml"
    for content in (b"optim: {lr: 0.5\n", b"seed: \xff\n"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"a\.yaml"):
            load_config([file], NEEDED)
    file.write_text("- seed: 3\n")
    with pytest.raises(ConfigError, match=r"a\.yaml must be a mapping of keys to values, got a list"):
        load_config([file], NEEDED)


def test_the_name_of_a_flat_section_is_unknown_and_hides_nothing(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("process: {condition_dropout: 0.5}\nmax_steps: 3\n")
    with pytest.raises(ConfigError, match=r"^\S+a\.yaml: unknown key process; nearest: \w+$"):
        load_config([file], [word for word in NEEDED if not word.startswith("max_steps")])


def test_messages_do_not_name_flat_sections(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("tasks: ${nothing}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: .*tasks") as refusal:
        load_config([file], NEEDED)
    assert "process" not in str(refusal.value)


def test_a_dumped_config_loads_as_itself(tmp_path):
    config = load_config([], [*NEEDED, "tasks.i2v=0.5", "tasks.t2v=0.5", "optim.betas=[0.8,0.9]"])
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert load_config([file]) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    schema = EncodeConfig if path.name.startswith("encode_") else TrainConfig
    words = ["source=s", "out=o"] if schema is EncodeConfig else []
    is_overlay = path.name.startswith(("demo_", "baseline_"))  # differences from demo.yaml
    below = [CONFIGS / "demo.yaml"] if is_overlay else []
    assert isinstance(load(schema, [*below, path], words), schema)


RECIPES = ("t2v_2b", "i2v_2b", "interpolation_2b", "mixture_2b")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("overlay", sorted((CONFIGS / "overlays").glob("*.yaml")), ids=lambda p: p.name)
def test_every_overlay_changes_what_it_names_and_nothing_else(recipe, overlay):
    plain = load_config([CONFIGS / f"{recipe}.yaml"])
    changed = load_config([CONFIGS / f"{recipe}.yaml", overlay])
    before, after = values(plain), values(changed)
    differing = {key for key in before if before[key] != after[key]} - SECTIONS
    assert differing
    assert differing <= set(leaves(overlay))
    assert (
        changed.plan.packs_per_step * changed.plan.token_budget == plain.plan.packs_per_step * plain.plan.token_budget
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_the_paper_s_size(recipe):
    config = load_config([CONFIGS / f"{recipe}.yaml"])
    spec = config.model.spec()
    assert (spec.num_layers, spec.hidden_size, spec.num_heads) == (38, 1536, 24)
    assert spec.in_channels == 128
    assert config.zero.stage == 3
    assert config.run_dir == f"runs/{recipe}"
    tasks = {task for task, probability in config.process.tasks.items() if probability}
    assert (
        tasks
        == {
            "t2v_2b": {"t2v", "i2v"},
            "i2v_2b": {"i2v"},
            "interpolation_2b": {"interpolation"},
            "mixture_2b": {"t2v", "i2v", "v2v", "interpolation", "completion"},
        }[recipe]
    )


def test_a_file_extends_another_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 5\noptim: {lr: 0.5}\ntasks: {t2v: 1.0}\n")
    (tmp_path / "over.yaml").write_text("extends: base.yaml\noptim: {warmup_steps: 3}\ntasks: {i2v: 1.0}\n")
    config = load_config([tmp_path / "over.yaml"], NEEDED)
    assert (config.seed, config.optim.lr, config.optim.warmup_steps, config.process.tasks) == (5, 0.5, 3, {"i2v": 1.0})
    (tmp_path / "base.yaml").write_text("extends: over.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config([tmp_path / "over.yaml"], NEEDED)
    (tmp_path / "base.yaml").write_text("extends: none.yaml\n")
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_config([tmp_path / "over.yaml"], NEEDED)


def test_all_problems_are_named_at_once(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("optim: {lrr: 1, lr: -1}\nsed: 3\n")
    words = [word for word in NEEDED if not word.startswith(("max_steps", "run_dir"))]
    with pytest.raises(ConfigError) as refusal:
        load_config([file], [*words, "zero.stage=7", "oops"])
    text = str(refusal.value)
    assert text.startswith("7 problems: [1] ")
    for part in (
        "unknown key optim.lrr", "unknown key sed", "optim.lr must be a number > 0, got -1",
        "zero.stage must be an integer from 0 to 3, got 7",
        "override must have the form key=value, got 'oops'", "max_steps has no value", "run_dir has no value",
    ):  # fmt: skip
        assert text.count(part) == 1, part


def test_a_value_may_refer_to_any_key(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "samples: {max_frames: '${token_budget}', num_clips: '${plan_size.count}'}\n"
        "time_shift: ${optim.lr}\noptim: {lr: 2.0, betas: ['${condition_dropout}', 0.9]}\nseed: ${packs_per_step}\n"
    )
    with pytest.raises(ConfigError, match="plan_size"):
        load_config([file], NEEDED)
    file.write_text(file.read_text().replace(", num_clips: '${plan_size.count}'", ""))
    config = load_config([file], [*NEEDED, "condition_dropout=0.25"])
    assert (config.samples.max_frames, config.process.time_shift, config.seed) == (512, 2.0, 2)
    assert list(config.optim.betas) == [0.25, 0.9]
    file.write_text("seed: ${.token_budget}\ntime_shift: ${.optim.lr}\noptim: {warmup_steps: '${..seed}', lr: 2.5}\n")
    config = load_config([file], NEEDED)
    assert (config.seed, config.process.time_shift, config.optim.warmup_steps) == (512, 2.5, 512)

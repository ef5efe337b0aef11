"""The settings of a fine-tuning run: limits, YAML, and what may differ on resume."""

from __future__ import annotations

import pytest

from saft_clip.config import FinetuneConfig
from saft_clip.errors import ConfigError


def config(**values):
    return FinetuneConfig(train_data="data", **values)


def test_defaults_are_the_papers():
    ours = config()
    assert (ours.model, ours.weights) == ("ViT-B-16", "openai")
    assert (ours.method, ours.density, ours.shots) == ("saft", 1e-3, 16)
    assert (ours.lr, ours.wd, ours.precision) == (5e-6, 0.1, "amp_bf16")


def test_tiny_model_brings_its_own_weights():
    assert config(model="saft-tiny").weights is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"density": 0.0}, "--density must be above 0 and at most 1, not 0.0"),
        ({"density": 1.5}, "--density must be above 0 and at most 1, not 1.5"),
        ({"density": float("nan")}, "--density must be above 0 and at most 1, not nan"),
        ({"lr": -1.0}, "--lr must be above 0, not -1.0"),
        ({"beta2": 1.0}, "--beta2 must be at least 0 and below 1, not 1.0"),
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"batch_size": 2.5}, "--batch-size cannot be 2.5: it must be a whole number"),
        ({"shots": True}, "--shots cannot be True: it must be a whole number"),
        ({"lr": "fast"}, "--lr cannot be 'fast': it must be a number"),
        ({"eval_data": ["x"]}, r"--eval-data cannot be \['x'\]: it must be a list of texts"),
        ({"gradients": "sparse"}, "--gradients must be dense or streamed or sampled, not 'sparse'"),
        ({"precision": "fp8"}, "--precision must be fp32 or amp_bf16, not 'fp8'"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)


def test_yaml_round_trip(tmp_path):
    ours = config(eval_data=("a", "b"), lr=3e-5, warmup=7, grad_clip_norm=1.0)
    ours.save(tmp_path / "config.yaml")
    assert FinetuneConfig.load(tmp_path / "config.yaml") == ours


def test_yaml_takes_a_number_without_a_point(tmp_path):
    (tmp_path / "config.yaml").write_text("train_data: x\nlr: 5e-6\n")
    assert FinetuneConfig.load(tmp_path / "config.yaml").lr == 5e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1e-5\n", "does not say what to train on"),
        ("train_data: x\nlearning: 1\n", "unknown setting 'learning'"),
        ("train_data: x\nepoch: 1\n", "did you mean 'epochs'?"),
        ("- x\n", "is not a list of settings"),
        ("train_data: [", "is not valid YAML"),
        ("train_data: x\nlr: -1\n", r"config.yaml is wrong: --lr must be above 0"),
        (f"train_data: [{'[x], ' * 5000}]", "cannot be .*…: it must be text"),
        (f"train_data: x\n{'y' * 900}: 1\n", "unknown setting 'y+…"),
        # What PyYAML's own functions stumble over.
        *(
            (f"train_data: {value}", "is not valid YAML")
            for value in ("2001-99-99", "!!int x", "!!bool x", "!!timestamp x", "9" * 5000, "!!x y")
        ),
        # What would take a minute, or all memory.
        ("train_data: " + "[" * 5000, "is not valid YAML"),
        ("train_data: " + "- " * 5000, "is not valid YAML"),
        ("\n".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]" for i in range(1, 30)), "not valid YAML"),
        ("train_data: &x y\nmodel: *x", "is not valid YAML"),
        ("train_data: " + "x" * (1 << 16), "is larger than any configuration"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        FinetuneConfig.load(tmp_path / "config.yaml")
    assert str(tmp_path / "config.yaml") in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_missing_yaml(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        FinetuneConfig.load(tmp_path / "config.yaml")


def test_command_holds_only_what_differs():
    ours = config(eval_data=("a b", "c"), augment=False, resume=True, lr=1e-5)
    assert ours.command() == (
        "saft finetune --train-data data --eval-data 'a b' --eval-data c --resume --no-augment "
        "--lr 1e-05"
    )


def test_differences_name_only_what_changes_the_result():
    ours = config(lr=1e-5, workers=2, output="here", tensorboard=True)
    assert ours.differences(config()) == ["--lr is 1e-05, not 5e-06"]

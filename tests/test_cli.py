"""The ``saft`` command: options, results on stdout, exit codes."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import open_clip
import pytest
import torch

from clip_helpers import SMALL, small_checkpoint, write_folder
from html_page import Page
from saft_clip import deltas, settings, tuned
from saft_clip.adapter_file import save_adapter
from saft_clip.cli import main
from saft_clip.config import FinetuneConfig, dashed
from saft_clip.console import progress
from saft_clip.data import load_dataset
from saft_clip.evaluate import evaluate_zero_shot
from saft_clip.methods import METHODS
from saft_clip.models import fingerprint_of, load_model
from saft_clip.prompts import ClassPrompts
from saft_clip.settings import run_with_settings
from saft_kernels.delta import SparseDelta
from saft_kernels.errors import SaftError
from saft_kernels.mask import CooMask

COMMANDS = ["demo", "finetune", "evaluate", "select", "delta", "delta info", "report", "doctor"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(small_checkpoint(tmp_path_factory.mktemp("weights") / "small.safetensors"))


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """An image folder with splits."""
    root = tmp_path_factory.mktemp("pets")
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        write_folder(root / split, {"cat": count, "big_dog": count, "newt": count})
    return str(root)


@pytest.fixture
def small(checkpoint):
    return ["--model", SMALL, "--pretrained", checkpoint]


# Help and options


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from saft_clip.cli import main; assert main(['--help']) == 0; "
        "assert not {'torch', 'open_clip', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS if " " not in name)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    assert f"saft {command}" in capsys.readouterr().out


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "saft_clip", "evaluate"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--data" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["evaluate"],
        ["evaluate", "--data", "x", "--batch-size", "0"],
        ["evaluate", "--data", "x", "--nonsense"],
        ["finetune", "--nonsense"],
        ["finetune", "--train-data", "x", "--lr", "fast"],
        ["select"],
        ["delta", "info"],
        ["report"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert "Usage: saft" in shown.err
    assert "Traceback" not in shown.err


def configured(*arguments):
    """What ``saft finetune`` makes of its options."""
    seen = []
    with pytest.raises(SystemExit) as done:
        run_with_settings(seen.append, arguments, name="saft finetune", help="")
    assert done.value.code == 0
    return seen[0]


def other_value(item):
    """Words of the command line that set a field to another value than its default; that value."""
    special = {
        "train_data": "photos",
        "method": "full",
        "optimizer": "sgd",
        "momentum": 0.5,
        "alpha": 0.5,
        "gradients": "dense",
        "precision": "fp32",
        "density": 0.25,
        "beta1": 0.5,
        "beta2": 0.5,
        "warmup": 7,
        "grad_clip_norm": 2.5,
        "eval_data": ("a", "b"),
        "eval_split": "val",
        "eval_images": 7,
        "alphas": (0.25, 1.0),
        "template": ("a {}", "one {}"),
    }
    flag = f"--{dashed(item.name)}"
    if isinstance(item.default, bool):
        return [f"--no-{dashed(item.name)}" if item.default else flag], not item.default
    value = special.get(item.name)
    default = item.metadata.get("default")
    if default is None and item.metadata.get("by_method"):
        default = 1  # any number
    if value is None:
        value = default + 3 if isinstance(default, int | float) else "other"
    values = value if isinstance(value, tuple) else (value,)
    return [word for one in values for word in (flag, str(one))], value


@pytest.mark.parametrize("item", fields(FinetuneConfig), ids=lambda item: item.name)
def test_every_setting_is_an_option(item):
    words, value = other_value(item)
    has_it = [each.name for each in METHODS.values() if item.name in each.defaults]
    some = item.metadata.get("by_method") and item.metadata["default"] is None
    method = {"method": has_it[0]} if some else {}
    config = configured("--train-data", "x", *(["--method", has_it[0]] if some else []), *words)
    assert getattr(config, item.name) == value
    expected = FinetuneConfig(**{"train_data": "x", **method, item.name: value})
    assert config == expected
    assert configured(*shlex.split(expected.command())[2:]) == expected


def test_finetune_help_names_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["finetune", "--help"]) == 0
    shown = capsys.readouterr().out
    for item in fields(FinetuneConfig):
        assert f"--{dashed(item.name)}" in shown
    assert "[default: 5e-06, the paper's; of some methods another]" in shown
    assert "[default: 16, the paper's]" in shown
    assert all(name in shown for name in METHODS)
    assert "[default: a tenth of all, ours]" in shown


def test_options_win_over_the_file_of_settings(tmp_path):
    file = tmp_path / "run.yaml"
    FinetuneConfig(train_data="x", lr=0.5, shots=3, augment=False).save(file)
    config = configured("--config", str(file), "--lr", "0.25", "--augment")
    assert (config.train_data, config.lr, config.shots, config.augment) == ("x", 0.25, 3, True)


def test_another_method_than_the_files_brings_its_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    FinetuneConfig(train_data="x", method="coop", seed=4).save(file)
    config = configured("--config", str(file), "--method", "full")
    assert (config.method, config.seed, config.lr, config.optimizer) == ("full", 4, 5e-6, "adamw")
    assert config.context is None


def test_resumed_run_takes_its_own_settings(tmp_path):
    FinetuneConfig(train_data="x", shots=3, output=str(tmp_path)).save(tmp_path / "config.yaml")
    config = configured("--resume", "--output", str(tmp_path))
    assert config.resume
    assert (config.train_data, config.shots, config.output) == ("x", 3, str(tmp_path))


def test_finetune_without_data(capsys):
    assert main(["finetune"]) == 1
    assert "nothing to train on: give --train-data" in capsys.readouterr().err


# Exit codes


def test_expected_errors_are_one_sentence(monkeypatch, capsys):
    def fail(*_, **__):
        raise SaftError("this went wrong\n  there: do that")

    monkeypatch.setattr(deltas, "info", fail)
    assert main(["delta", "info", "x"]) == 1
    shown = capsys.readouterr()
    assert shown.err == "saft: this went wrong there: do that\n"
    assert shown.out == ""


def test_refusals_of_the_disk_are_one_sentence(monkeypatch, capsys):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", "/some/where")

    monkeypatch.setattr(deltas, "info", fail)
    assert main(["delta", "info", "x"]) == 1
    assert capsys.readouterr().err == (
        "saft: /some/where cannot be written or read: Permission denied\n"
    )


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(2, "No", "bug")])
def test_unexpected_errors_keep_their_traceback(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(deltas, "info", fail)
    with pytest.raises(type(error)):
        main(["delta", "info", "x"])


def test_interruption_exits_with_130(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(deltas, "info", interrupt)
    assert main(["delta", "info", "x"]) == 130
    assert "Traceback" not in capsys.readouterr().err


# Commands


def test_evaluate_prints_a_table_and_writes_json(small, checkpoint, pets, tmp_path, capsys):
    zoo = str(write_folder(tmp_path / "zoo", {"ant": 2, "bee": 2}))
    file = tmp_path / "out.json"
    options = ["--data", pets, "--data", zoo, "--batch-size", "2", "--json", str(file)]
    assert main(["evaluate", *small, *options]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    content = json.loads(file.read_text())
    clip = load_model(SMALL, checkpoint)
    for spec, result in zip((pets, zoo), content["results"], strict=True):
        expected = evaluate_zero_shot(clip, load_dataset(spec, "test", clip.preprocess_val))
        assert result == {"data": spec, **expected.to_dict()}
        assert f"{100 * expected.top1:.2f} ± {100 * expected.top1_stderr:.2f}" in shown.out
    assert (content["model"], content["pretrained"]) == (SMALL, checkpoint)
    assert (content["delta"], content["split"]) == (None, "test")
    assert "mean" in shown.out


def test_evaluate_with_split_templates_and_precision(small, pets, capsys):
    options = ["--split", "val", "--template", "a {}", "--template", "simple"]
    assert main(["evaluate", *small, "--data", pets, *options, "--precision", "amp_bf16"]) == 0
    assert " 6 " in capsys.readouterr().out


@pytest.fixture
def delta(checkpoint, tmp_path):
    """A delta that turns the image embedding upside down."""
    clip = load_model(SMALL, checkpoint)
    projection = clip.model.visual.proj
    mask = CooMask.from_indices(clip.model, {"visual.proj": torch.arange(projection.numel())})
    base = {name: value.clone() for name, value in clip.model.state_dict().items()}
    with torch.no_grad():
        projection.neg_()
    SparseDelta.capture(clip.model, mask, base=base).save(tmp_path / "delta.safetensors")
    return clip, str(tmp_path / "delta.safetensors")


def test_evaluate_with_a_delta(small, pets, tmp_path, delta):
    clip, path = delta
    file = tmp_path / "out.json"
    assert main(["evaluate", *small, "--data", pets, "--delta", path, "--json", str(file)]) == 0
    expected = evaluate_zero_shot(clip, load_dataset(pets, "test", clip.preprocess_val))
    content = json.loads(file.read_text())
    assert content["results"] == [{"data": pets, **expected.to_dict()}]
    assert content["delta"] == path


def test_finetune_ends_with_accuracies_before_and_after(small, pets, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--train-data", pets, "--shots", "1", "--epochs", "1", "--output", str(run)]
    assert main(["finetune", *small, *options]) == 0
    shown = capsys.readouterr().out
    evaluations = json.loads((run / "results.json").read_text())["evaluations"]
    assert len(evaluations) == 2
    for line in evaluations:
        assert f"{100 * line['top1']:.2f} ±" in shown


def test_evaluate_takes_the_model_from_the_delta(small, pets, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "out.json"
    options = ["--train-data", pets, "--shots", "1", "--epochs", "1", "--output", str(run)]
    assert main(["finetune", *small, *options]) == 0
    delta = ["--delta", str(run / "delta.safetensors")]
    assert main(["evaluate", "--data", pets, *delta, "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert [content["model"], content["pretrained"]] == small[1::2]


ADAPTERS = ["lp", "lp-ft", "wise-ft", "coop", "cocoop", "maple"]


@pytest.mark.parametrize("method", ADAPTERS)
def test_evaluate_with_an_adapter(small, pets, tmp_path, capsys, method):
    """Of whatever method: the command of the run's page gives what the run found."""
    run, file = tmp_path / "run", tmp_path / "results.json"
    own = {"maple": ["--depth", "1"], "coop": ["--context", "4"]}.get(method, [])
    few = ["--shots", "1", "--epochs", "2", "--lr", "0.05", *own]
    where = ["--train-data", pets, "--eval-data", pets, "--output", str(run)]
    assert main(["finetune", "--method", method, *small, *where, *few, "--precision", "fp32"]) == 0
    capsys.readouterr()
    adapter = ["--adapter", str(run / "adapter.safetensors")]
    assert main(["evaluate", "--data", pets, *adapter, "--json", str(file)]) == 0
    results = json.loads((run / "results.json").read_text())["evaluations"]
    (after,) = (line for line in results if line["when"] == "after")
    (found,) = json.loads(file.read_text())["results"]
    assert (found["top1"], found["per_class"]) == (after["top1"], after["per_class"])
    page = Page((run / "report.html").read_text()).text
    assert f"--adapter {run / 'adapter.safetensors'}" in page
    assert f"after, as {METHODS[method].title} classifies" in page
    assert "lora-alpha" not in page  # which it has no use for
    own_only = method in ("lp", "coop", "cocoop", "maple")
    assert ("share of it" in page) == (not own_only)


def test_an_adapter_that_cannot_be_used(small, pets, tmp_path, capsys):
    adapter = tmp_path / "adapter.safetensors"
    prompts = ClassPrompts(("a", "b"), ("{}",), open_clip.get_tokenizer(SMALL))
    training = json.dumps(FinetuneConfig(train_data="x", method="lp").training())
    base = fingerprint_of(load_model(SMALL, small[3]).model)
    good = {"method": "lp", "training": training, "base": base}
    for tensors, texts, sentence in (
        ({"adapter.head": torch.ones(2, 3)}, good, "'adapter.head' must have the shape [2, 16]"),
        ({"x": torch.ones(1)}, good, "must have the shape"),
        ({"adapter.head": torch.ones(2, 16)}, good | {"base": "0"}, "made for other weights"),
        ({}, good | {"training": "{"}, "cannot be used with small-clip"),
        ({}, good | {"training": "{}"}, "does not say what to train on"),
        ({}, {"method": "full", "training": training.replace('"lp"', '"full"')}, "no adapters"),
    ):
        save_adapter(adapter, tensors, texts, prompts)
        words = ["evaluate", *small, "--data", pets, "--adapter", str(adapter)]
        assert main(words) == 1
        shown = capsys.readouterr().err
        assert str(adapter) in shown.replace("\n", "")
        assert sentence in " ".join(shown.split())
    assert main([*words, "--delta", "x"]) == 1
    assert "not both" in capsys.readouterr().err


def test_delta_made_with_quick_gelu_is_evaluated_with_it(small, pets, tmp_path, monkeypatch):
    run = tmp_path / "run"
    settings = ["--shots", "2", "--epochs", "1", "--batch-size", "4", "--precision", "fp32"]
    train = ["--train-data", pets, "--density", "0.05", "--force-quick-gelu"]
    assert main(["finetune", *small, *settings, *train, "--output", str(run)]) == 0
    asked = []

    def spy(*arguments, **options):
        asked.append(options["force_quick_gelu"])
        return load_model(*arguments, **options)

    monkeypatch.setattr(tuned, "load_model", spy)
    assert main(["evaluate", "--delta", str(run / "delta.safetensors"), "--data", pets]) == 0
    assert main(["evaluate", *small, "--data", pets]) == 0
    assert asked == [True, False]


def test_select_writes_the_mask_that_finetune_selects(small, pets, tmp_path, capsys):
    settings = [*small, "--train-data", pets, "--shots", "3", "--density", "0.01"]
    file = tmp_path / "mask.safetensors"
    assert main(["select", *settings, "--output", str(file)]) == 0
    mask = CooMask.load(file)
    assert mask.nnz == mask.numel // 100
    assert "logit_scale" not in mask.shapes
    run = tmp_path / "run"
    assert main(["finetune", *settings, "--epochs", "1", "--output", str(run)]) == 0
    assert CooMask.load(run / "mask.safetensors") == mask
    assert main(["select", *settings, "--output", str(file), "--score", "magnitude"]) == 0
    assert CooMask.load(file) != mask


def test_finetune_then_evaluate_and_report(small, pets, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--train-data", pets, "--shots", "2", "--epochs", "2", "--lr", "1e-2"]
    assert main(["finetune", *small, *options, "--output", str(run), "--precision", "fp32"]) == 0
    file = tmp_path / "out.json"
    delta = ["--delta", str(run / "delta.safetensors")]
    assert main(["evaluate", *small, "--data", pets, *delta, "--json", str(file)]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    after = [line for line in lines if line.get("when") == "after"]
    assert json.loads(file.read_text())["results"][0]["top1"] == after[0]["top1"]
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size == pytest.approx(len(page), rel=0.05)


def test_report_of_a_folder_without_a_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "open_clip", "saft-tiny", "reference"):
        assert word in shown


def test_results_of_the_same_name_are_told_apart(small, pets, tmp_path, monkeypatch):
    other = write_folder(tmp_path / "other" / Path(pets).name, {"cat": 2, "dog": 2})
    tables = []
    monkeypatch.setattr("saft_clip.commands.output.print", tables.append)
    assert main(["evaluate", *small, "--data", pets, "--data", str(other)]) == 0
    assert list(tables[0].columns[0].cells) == [pets, str(other), "mean"]


def test_results_are_written_before_they_are_shown(small, pets, tmp_path, monkeypatch):
    def fail(*arguments):
        raise UnicodeEncodeError("ascii", "±", 0, 1, "not in range")

    monkeypatch.setattr("saft_clip.commands.output.print", fail)
    file = tmp_path / "results.json"
    with pytest.raises(UnicodeEncodeError):
        main(["evaluate", *small, "--data", pets, "--json", str(file)])
    assert json.loads(file.read_text())["results"]


def test_a_terminal_without_unicode(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "saft_clip", "finetune", "--help"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--train-data" in done.stdout


def test_results_that_cannot_be_written_are_noticed_before_the_work(small, tmp_path, capsys):
    command = ["evaluate", *small, "--data", "nowhere", "--json", str(tmp_path)]
    assert main(command) == 1
    assert "it is a folder; name a file in it" in capsys.readouterr().err


def test_a_moved_run_is_resumed_where_it_is(tmp_path):
    FinetuneConfig(train_data="pets", output=str(tmp_path / "before")).save(
        tmp_path / "config.yaml"
    )
    given = {"resume": True, "output": str(tmp_path)}
    assert settings._configure(None, given).output == str(tmp_path)


def test_help_says_where_defaults_come_from(capsys):
    main(["finetune", "--help"])
    shown = capsys.readouterr().out
    assert "the paper's]" in shown
    assert "ours]" in shown


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr("saft_clip.console.LINE_INTERVAL", 0.0)
    with progress("training", 4) as advance:
        advance(1)
        advance(2, note="epoch 1")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"training: 1 of 4 images, [\d.,]+ images/s, 0:00:0\d left", lines[0])
    assert lines[1].endswith(" left, epoch 1")

"""What a run's folder holds besides tensors: settings, inputs, the record, results, the demo's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fuzz import mutations, trees
from fuzz.choices import Choices
from fuzz.oracles import check_shown, refusals, require
from fuzz.targets.base import Target
from html_page import Page
from saft_clip.commands import before_and_after_table
from saft_clip.config import FinetuneConfig
from saft_clip.console import output
from saft_clip.data.coop import list_images, read_split_file
from saft_clip.errors import CheckpointError, ConfigError, DataError
from saft_clip.report import write_report
from saft_clip.results import read_results
from saft_clip.run_folder import RunFolder

_CONFIG = FinetuneConfig(
    train_data="builtin:mnist",
    eval_data=("builtin:uci", "pets/"),
    model="saft-tiny",
    template=("a {}.", "the {}"),
    warmup=3,
    grad_clip_norm=1.0,
)
_INPUTS = {
    "the training data": {"images": 6, "classes": 2, "sha256": "0123456789abcdef"},
    "the pretrained model": {"fingerprint": "0123456789abcdef"},
}


def _evaluation(when: str, spec: str, top1: float) -> dict[str, Any]:
    return {
        **{"kind": "evaluation", "step": 0, "when": when, "spec": spec, "shifted": spec != "a"},
        **{"includes_training": False, "dataset": spec, "n": 10, "top1": top1, "top5": 1.0},
        **{"mean_per_class": top1, "top1_stderr": 0.1, "mean_per_class_stderr": 0.1},
        **{"per_class": {"cat": 0.5, "dog": None}, "per_class_n": {"cat": 10, "dog": 0}},
        "skipped": ["a.png: broken"],
    }


_EVALUATIONS = [_evaluation(w, s, t) for w, t in (("before", 0.5), ("after", 0.7)) for s in "ab"]
_METRICS = [
    *_EVALUATIONS[:2],
    *({"kind": "train", "step": i, "epoch": 1, "loss": 1 / i, "seconds": 0.1} for i in range(1, 5)),
    {"kind": "validation", "step": 4, "epoch": 1, "top1": 0.6, "n": 10},
    *_EVALUATIONS[2:],
]
_RESULTS = {
    **{"method": "SAFT", "model": "saft-tiny", "pretrained": "builtin", "parameters": 1000},
    **{"trained": 10, "model_bytes": 4000, "artefact": "delta.safetensors", "artefact_bytes": 70},
    "blocks": [
        {"encoder": e, "block": b, "kind": k, "trained": 3, "parameters": 9}
        for e in ("image", "text")
        for b, k in (("in", "embedding"), ("1", "mlp"), ("out", "norm"))
    ],
    "evaluations": _EVALUATIONS,
    "seconds": {"preparation": 0.5, "training": 1.5},
    "cost": {"step_seconds": 0.01, "peak_memory_bytes": 10**9},
    "environment": {"python": "3.11", "device": "CPU"},
}


def _outcome(method: str, density: float, lr: float, **more: Any) -> dict[str, Any]:
    trial = {"method": method, "lr": lr, "density": density, "seed": 1, "final": True}
    accuracy = {"mnist": 0.9, "uci": 0.8, "letters": 0.7, **more}
    return {"trial": trial, "accuracy": accuracy, "trained": 10, "seconds": 1.0}


_DEMO = {
    "plan": {
        **{"trained": "mnist", "shots": 2, "epochs": 1, "seeds": [1, 2], "full_lrs": [1e-4]},
        "saft_lrs": [[0.01, [1e-3]], [0.1, [1e-3]]],
    },
    "domains": {"mnist": "digits", "uci": "other digits", "letters": "letters"},
    "roles": {"trained": "mnist", "shifted": ["uci"], "new_classes": "letters"},
    "images": {"mnist": 5, "uci": 5, "letters": 5, "val": 5},
    "tuning": [_outcome("full", 1.0, 1e-4, val=0.9), _outcome("saft", 0.01, 1e-3, val=0.9)],
    "finals": [
        *(_outcome("full", 1.0, 1e-4), _outcome("zero-shot", 0.0, 0.0)),
        *(_outcome("saft", density, 1e-3) for density in (0.01, 0.1, 0.01)),
    ],
    "chosen": {"full": {"lr": 1e-4, "density": 1.0}, "saft": {"lr": 1e-3, "density": 0.01}},
    "artefacts": {"delta.safetensors": 30_000, "model.safetensors": 16_000_000},
    "seconds": 100.0,
    "environment": {"python": "3.11", "device": "CPU"},
}
_SPLITS = {
    "train": [["a/1.png", 0, "a_cat"], ["b/1.png", 1, "dog"]],
    "val": None,
    "test": [["a/2.png", 0, "a_cat"]],
}


def _prepare(folder: Path) -> None:
    """A finished run, once for each folder that is read."""
    if (folder / "config.yaml").exists():
        return
    _CONFIG.save(folder / "config.yaml")
    (folder / "inputs.json").write_text(json.dumps(_INPUTS))
    (folder / "results.json").write_text(json.dumps(_RESULTS))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in _METRICS))


class JsonTarget(Target):
    """A JSON file: other trees, other texts."""

    suffix = ".json"
    content: ClassVar[Any]

    def make_seeds(self) -> list[bytes]:
        """What a run writes, in few bytes and in many."""
        return [json.dumps(self.content, indent=indent).encode() for indent in (None, 1)]

    def mutate(self, choices: Choices, content: bytes) -> bytes:
        """Change the tree or its text, or both."""
        if choices.one_in(6):
            return mutations.change_bytes(choices, content)
        for _ in range(choices.integer(1, 2)):
            content = mutations.change_json(choices, content).encode("utf-8", "surrogatepass")
        return content


class InputsTarget(JsonTarget):
    """``inputs.json``, which a resumed run compares with what it finds."""

    name = "inputs"
    weight = 6
    content = _INPUTS

    def read(self, path: Path) -> str:
        """Compare."""
        folder = path.parent / "run"
        folder.mkdir(exist_ok=True)
        _prepare(folder)
        (folder / "inputs.json").write_bytes(path.read_bytes())
        run = RunFolder(folder)
        with refusals(folder, of=(CheckpointError, ConfigError)) as refused, run.lock:
            run.start(_CONFIG.changed(resume=True), _INPUTS)
        return type(refused[0]).__name__ if refused else "accepted"


class ConfigTarget(Target):
    """``config.yaml``."""

    name = "config"
    suffix = ".yaml"
    weight = 8

    def make_seeds(self) -> list[bytes]:
        """Settings of two runs."""
        settings = [_CONFIG, FinetuneConfig(train_data="pets/", lr=1e-3, mask="m.safetensors")]
        return [yaml.safe_dump(each.to_dict(), sort_keys=False).encode() for each in settings]

    def mutate(self, choices: Choices, content: bytes) -> bytes:
        """Other text, other values, and what only YAML has."""
        lines = content.decode().splitlines()
        for _ in range(choices.integer(1, 2)):
            at = choices.integer(0, len(lines) - 1)
            name = lines[at].partition(":")[0]
            kind = choices.integer(0, 4)
            if kind == 0:
                lines[at] = f"{name}: {choices.pick(_YAML)}"
            elif kind == 1:
                lines[at] = f"{name}: {trees.dump(choices.pick(trees.ODD))}"
            elif kind == 2:
                lines.insert(at, choices.pick(_YAML))
            elif kind == 3 and len(lines) > 1:
                del lines[at]
            else:
                lines[at] = mutations.change_text(choices, lines[at])
        text = "\n".join(lines).encode("utf-8", "surrogatepass")
        return mutations.change_bytes(choices, text) if choices.one_in(6) else text

    def read(self, path: Path) -> str:
        """Load, save, load."""
        with refusals(path, of=(ConfigError,)) as refused:
            config = FinetuneConfig.load(path)
        if refused:
            return "ConfigError"
        again = path.with_name("again.yaml")
        config.save(again)
        require(FinetuneConfig.load(again) == config, "saved and loaded, these are other settings")
        config.command()
        return "accepted"


#: What means something in YAML, or once did harm there.
_YAML = (
    *("!!python/object/apply:os.system ['touch /tmp/executed']", "!!python/name:os.system ''"),
    *("!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!set {a, b}", "!x y"),
    *("2001-99-99", "190:20:30", "0o7", "0x_", "1_000", ".inf", "-.inf", ".NaN", "~", "yes", "- a"),
    *("1" * 5000, "[" * 200 + "]" * 200, "[" * 5000, "{a: " * 300, "&a [*a]", "*a", "<<: {a: b}"),
    *("? [a]\n: b", "? {a: b}\n: c", "|\n  a\n  b", ">-\n  a", "'", '"', "%YAML 9.9", "---", "..."),
    "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
        f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9)
    ]),
    "\n".join(["a0: &a0 {x: 1}"] + [
        f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}" for i in range(9)
    ]),
)  # fmt: skip


class SplitTarget(JsonTarget):
    """A split file in CoOp's format."""

    name = "split"
    weight = 6
    content = _SPLITS

    def read(self, path: Path) -> str:
        """List the images of every split that it has."""
        with refusals(path, of=(DataError,)) as refused:
            for split in read_split_file(str(path)):
                with refusals(path, of=(DataError,)):
                    list_images(str(path), split)
        return "DataError" if refused else "accepted"


class _PageTarget(JsonTarget):
    """A file from which a page is made; that takes a second, so there are few of them."""

    weight = 1
    seconds = 10.0
    memory = 64 << 20
    file: ClassVar[str]

    def read(self, path: Path) -> str:
        """Write the page, and see that it is one."""
        folder = path.parent / self.name
        folder.mkdir(exist_ok=True)
        self.prepare(folder)
        (folder / self.file).write_bytes(path.read_bytes())
        page = folder / "report.html"
        page.write_text("the one before")
        with refusals(folder, of=(CheckpointError, ConfigError)) as refused:
            write_report(folder)
        if refused:
            require(page.read_text() == "the one before", "a refused file changed the page")
            return type(refused[0]).__name__
        check_page(page.read_text())
        return "accepted"

    def prepare(self, folder: Path) -> None:
        """Write everything else that the page is made from."""
        _prepare(folder)


def check_page(text: str) -> None:
    """It is one page, in which nothing of a file is anything but text."""
    require("<script" not in text.lower(), "a script got into the page")
    require(bool(Page(text).text), "the page is empty")


class ResultsTarget(_PageTarget):
    """``results.json``."""

    name, file, content = "results", "results.json", _RESULTS

    def read(self, path: Path) -> str:
        """Besides the page: the table of a finished run."""
        with refusals(path, of=(CheckpointError,)) as refused:
            results = read_results(path)
        if not refused:
            with output.capture() as shown:
                output.print(before_and_after_table(results["evaluations"]))
            check_shown(shown.get())
        return super().read(path)


class MetricsTarget(_PageTarget):
    """``metrics.jsonl``."""

    name, file, content = "metrics", "metrics.jsonl", _METRICS

    def make_seeds(self) -> list[bytes]:
        """The record of a run."""
        return ["".join(f"{json.dumps(line)}\n" for line in self.content).encode()]

    def mutate(self, choices: Choices, content: bytes) -> bytes:
        """Change a line, or the text."""
        lines = content.decode().splitlines(keepends=True)
        at = choices.integer(0, len(lines) - 1)
        if choices.one_in(4):
            return mutations.change_bytes(choices, content)
        lines[at] = mutations.change_json(choices, lines[at]) + "\n"
        return "".join(lines).encode("utf-8", "surrogatepass")


class DemoTarget(_PageTarget):
    """``demo.json``."""

    name, file, content = "demo", "demo.json", _DEMO

    def prepare(self, folder: Path) -> None:
        """The pictures."""
        (folder / "samples").mkdir(exist_ok=True)
        for name in _DEMO["domains"]:
            (folder / "samples" / f"{name}.png").write_bytes(b"a picture")
        (folder / "secret.png").write_bytes(b"not for the page")


def run_folder_targets() -> tuple[Target, ...]:
    """All of them."""
    return (
        *(ConfigTarget(), InputsTarget(), SplitTarget()),
        *(ResultsTarget(), MetricsTarget(), DemoTarget()),
    )

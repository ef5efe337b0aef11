"""What makes each method that method: what it trains, on which loss, and what comes out."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from clip_helpers import SMALL_DEEP as SMALL
from clip_helpers import SMALL_RESNET, small_checkpoint
from saft_clip.adapter_file import load_adapter, save_adapter
from saft_clip.config import FinetuneConfig, dashed
from saft_clip.errors import CheckpointError, ConfigError
from saft_clip.evaluate import embed_classes, image_features, zero_shot_scores
from saft_clip.methods import METHODS, find, find_method
from saft_clip.methods.base import BESIDE, FROZEN, Method, prompt_loss
from saft_clip.methods.clipood import beta_density, margin_loss
from saft_clip.methods.flyp import contrastive_loss
from saft_clip.methods.kd import distillation_loss
from saft_clip.methods.lora import adaptable_layers
from saft_clip.models import ClipModel, fingerprint_of, load_model
from saft_clip.peak_memory import PeakMemory
from saft_clip.prompts import ClassPrompts, encode_prompts
from saft_clip.text_tower import padding_reason
from saft_kernels.delta import SparseDelta
from saft_kernels.errors import NonFiniteGradientError

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("cat", "dog", "small owl")
OTHERS = ("horse", "dog")
SPARSE = ["saft", "saft-fisher", "random", "magnitude"]
AVERAGED = [name for name in METHODS if "alpha" in METHODS[name].defaults]
TRAINING = [name for name in METHODS if name != "zero-shot"]

#: Settings that a small model asks for, or with which little data show what a method does.
SMALLER: dict[str, dict[str, Any]] = {"maple": {"depth": 2}, "coop": {"context": 4}}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> ClipModel:
    """The model that tests train copies of."""
    folder = tmp_path_factory.mktemp("weights")
    return load_model(SMALL, str(small_checkpoint(folder / "small.safetensors", SMALL)))


@dataclass
class Problem:
    """A method on a small model, and data for it."""

    config: FinetuneConfig
    clip: ClipModel
    base: nn.Module
    prompts: ClassPrompts
    images: Tensor
    labels: Tensor

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.images.split(4), self.labels.split(4), strict=True))

    def method(self, folder: Path | None = None) -> Method:
        made = find_method(self.config.method)(self.clip, self.prompts, self.config)
        made.prepare(self.batches, folder)
        return made

    def train(self, method: Method, steps: int, start: int = 0, total: int | None = None) -> None:
        for step in range(start, start + steps):
            images, labels = self.batches[step % len(self.batches)]
            method.loss(images, labels).backward()
            method.clip_grad_norm_(math.inf)
            method.step(self.config.lr)
            method.after_step(step + 1, total or start + steps)


@pytest.fixture
def problem(pretrained: ClipModel) -> Callable[..., Problem]:
    def make(name: str, **settings: Any) -> Problem:
        own = {"density": 0.02, "precision": "fp32", **SMALLER.get(name, {}), **settings}
        config = FinetuneConfig(train_data="builtin:mnist", model=SMALL, method=name, **own)
        clip = replace(pretrained, model=copy.deepcopy(pretrained.model))
        prompts = ClassPrompts(NAMES, ("a {}.", "the {}."), clip.tokenizer)
        generator = torch.Generator().manual_seed(0)
        size = clip.preprocess_val.transforms[0].size
        size = size if isinstance(size, int) else size[0]
        images = torch.randn(12, 3, size, size, generator=generator)
        labels = torch.arange(12) % len(NAMES)
        return Problem(config, clip, copy.deepcopy(clip.model), prompts, images, labels)

    return make


def differing(model: nn.Module, base: nn.Module) -> set[str]:
    own = dict(base.named_parameters())
    return {n for n, p in model.named_parameters() if not torch.equal(p, own[n])}


# Registry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_its_file(name: str) -> None:
    method = find_method(name)
    assert method.name == name
    assert method.__module__ == f"saft_clip.methods.{name.replace('-', '_')}"
    assert method.__doc__
    assert find(name).trains == (name != "zero-shot")


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_the_methods_and_can_be_changed(name: str) -> None:
    config = FinetuneConfig(train_data="x", method=name)
    for key, value in find(name).defaults.items():
        assert getattr(config, key) == value
        assert getattr(FinetuneConfig(train_data="x", method=name, **{key: value}), key) == value
    for item in fields(config):
        if item.metadata.get("by_method") and item.name not in find(name).defaults:
            assert getattr(config, item.name) == item.metadata["default"]
    assert f"--method {name}" in config.command() or name == "saft"
    assert "--lr" not in config.command()
    assert "--lr 0.5" in config.changed(lr=0.5).command()
    assert FinetuneConfig.from_dict(config.to_dict()) == config


def test_the_page_of_methods_says_what_the_registry_says() -> None:
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    rows = (
        page.partition("<!-- methods -->\n")[2].partition("<!-- /methods -->")[0].splitlines()[2:]
    )
    for row, entry in zip(rows, METHODS.values(), strict=True):
        name, title, does, defaults, source = (cell.strip() for cell in row.split("|")[1:-1])
        assert (name, title, does) == (f"`{entry.name}`", entry.title, entry.does)
        assert source == entry.source
        config = FinetuneConfig(train_data="x", method=entry.name)
        shown = {"lr": config.lr, **entry.defaults} if entry.name != "zero-shot" else {}
        said = dict(each.split(" ") for each in defaults.split(", ") if each)
        assert said == {
            dashed(key): value if isinstance(value, str) else f"{value:g}"
            for key, value in shown.items()
        }
    for name in METHODS:
        files = page.partition("## What comes out")[2].partition("Before training")[0]
        (line,) = (line for line in files.splitlines() if re.search(rf" {name}[ ,:]", line))
        assert f"`{find_method(name).artefact}`" in line


def test_a_setting_of_other_methods_is_refused() -> None:
    with pytest.raises(ConfigError, match="--method full has no --rank: that is a setting of lora"):
        FinetuneConfig(train_data="x", method="full", rank=4)
    with pytest.raises(ConfigError, match="a setting of coop, cocoop, maple"):
        FinetuneConfig(train_data="x", context=4)


def test_another_method_brings_its_defaults() -> None:
    config = FinetuneConfig(train_data="x", method="coop", epochs=7)
    other = config.changed(method="saft")
    assert (other.lr, other.optimizer, other.context) == (5e-6, "adamw", None)
    assert other.epochs == 7  # which was asked for
    assert config.changed(seed=2).lr == 2e-3


def test_a_method_is_a_text() -> None:
    with pytest.raises(ConfigError, match=r"--method cannot be .*: it must be text"):
        FinetuneConfig(train_data="x", method={"a": 1})  # type: ignore[arg-type]


def test_sparse_methods_step_with_adamw_only(problem: Callable[..., Problem]) -> None:
    with pytest.raises(ConfigError, match="saft steps with AdamW only, not --optimizer sgd"):
        problem("saft", optimizer="sgd").method()


# All methods --------------------------------------------------------------------------------------

#: What each trains: whether a parameter of the model of this name is trained.
TRAINS: dict[str, Callable[[str], bool]] = {
    "full": lambda name: name not in FROZEN,
    "visual": lambda name: name.startswith("visual."),
    "text": lambda name: not name.startswith("visual.") and name not in FROZEN,
    "bitfit": lambda name: name.endswith("bias") and name not in FROZEN,
    "lp": lambda name: False,
    "lp-ft": lambda name: name.startswith("visual."),
    "wise-ft": lambda name: name.startswith("visual."),
    "flyp": lambda name: name != "logit_bias",
    "clipood": lambda name: name.startswith("visual."),
    "l2sp": lambda name: name not in FROZEN,
    "l1sp": lambda name: name not in FROZEN,
    "kd": lambda name: name not in FROZEN,
    "coop": lambda name: False,
    "cocoop": lambda name: False,
    "maple": lambda name: False,
}


@pytest.mark.parametrize("name", TRAINS)
def test_what_is_trained_and_what_is_not(problem: Callable[..., Problem], name: str) -> None:
    """Every parameter that is meant to be trained gets a gradient, and no other moves by a bit."""
    case = problem(name, lr=1e-2)
    method = case.method()
    meant = {n for n, _ in case.base.named_parameters() if TRAINS[name](n)}
    assert {n for n in method.trained if not n.startswith(BESIDE)} == meant
    case.train(method, 3)
    assert differing(case.clip.model, case.base) <= meant
    if name not in ("l1sp", "lp"):
        # The token embeddings of words that are in no prompt stay, but the tensor moves.
        assert differing(case.clip.model, case.base) == meant
    counts = {n: p.numel() for n, p in case.base.named_parameters()}
    assert all(method.trained[n] == counts[n] for n in meant)


@pytest.mark.parametrize("name", TRAINING)
def test_the_loss_goes_down(problem: Callable[..., Problem], name: str) -> None:
    rates = {"coop": 0.3, "cocoop": 0.1, "maple": 0.1, "lp": 1e-2, "lora": 1e-2}
    case = problem(name, lr=rates.get(name, 1e-3), batch_size=12)
    method = case.method()
    before = float(method.loss(case.images, case.labels))
    for _ in range(12):
        method.loss(case.images, case.labels).backward()
        method.clip_grad_norm_(1.0)
        method.step(case.config.lr)
    assert float(method.loss(case.images, case.labels)) < before


@pytest.mark.parametrize("name", TRAINING)
def test_steps_under_bf16_autocast(problem: Callable[..., Problem], name: str) -> None:
    """The loss is fp32 and finite, every trained tensor gets a gradient, answers are numbers."""
    case = problem(name, precision="amp_bf16", lr=1e-3)
    method = case.method()
    loss = method.loss(case.images, case.labels)
    assert loss.dtype == torch.float32
    loss.backward()
    params = getattr(method, "params", {})
    assert all(param.grad is not None for param in params.values())
    norm = method.clip_grad_norm_(1.0)
    assert 0 < float(norm) < math.inf
    method.step(case.config.lr)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = method.scores(case.prompts)(case.images)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", TRAINING)
def test_a_checkpoint_continues_bit_for_bit(problem: Callable[..., Problem], name: str) -> None:
    """Six steps are three, a checkpoint, a fresh model, and three more; so is the result."""
    outcomes = []
    for parts in ([6], [3, 3]):
        done, state = 0, None
        for steps in parts:
            case = problem(name, lr=1e-3)
            torch.manual_seed(done)  # FLYP draws captions
            method = case.method()
            if state is not None:
                method.load_state_dict(state)
            for _ in range(steps):
                torch.manual_seed(done)
                case.train(method, 1, start=done, total=6)
                done += 1
            state = copy.deepcopy(method.state_dict())
        method.finish(lambda case=case: case.base)
        scores = method.scores(case.prompts)
        with torch.no_grad():
            outcomes.append([scores(case.images), *map(Tensor.clone, case.clip.model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("name", TRAINING)
def test_a_checkpoint_of_another_method_changes_nothing(
    problem: Callable[..., Problem], name: str
) -> None:
    case = problem(name)
    method = case.method()
    before = copy.deepcopy(method.state_dict())
    for broken in ({}, {"values": {}}, {"values": None, "mask": "x"}, {**before, "values": {}}):
        with pytest.raises(CheckpointError):
            method.load_state_dict(broken)
    again = method.state_dict()
    assert repr(again) == repr(before)


@pytest.mark.parametrize("name", ["full", "lp", "wise-ft", "coop", "maple", "saft"])
def test_what_has_diverged_is_no_result(problem: Callable[..., Problem], name: str) -> None:
    """Whether it is the model's own or stands beside it."""
    method: Any = problem(name).method()
    method.require_finite()
    param = next(iter(method.params.values())) if hasattr(method, "params") else None
    param = method.model.visual.proj if param is None else param
    with torch.no_grad():
        param.view(-1)[0] = math.nan
    with pytest.raises(NonFiniteGradientError, match=r"training has diverged: .* lower --lr"):
        method.require_finite()


@pytest.mark.parametrize("name", METHODS)
def test_other_classes_can_be_asked_for(problem: Callable[..., Problem], name: str) -> None:
    """Scores are numbers, for classes that were not trained on, too, and answer in any order."""
    case = problem(name)
    method = case.method()
    if find(name).trains:
        case.train(method, 2)
    tokenizer = case.clip.tokenizer
    with torch.inference_mode():
        found = method.scores(ClassPrompts(OTHERS, ("a {}.",), tokenizer))(case.images)
        turned = method.scores(ClassPrompts(OTHERS[::-1], ("a {}.",), tokenizer))(case.images)
    assert found.shape == (12, 2)
    assert found.isfinite().all()
    torch.testing.assert_close(found, turned.flip(1))


@pytest.mark.parametrize("name", ["saft", "full", "lp", "kd", "clipood", "flyp", "wise-ft", "lora"])
def test_the_first_answers_are_the_zero_shot_ones(
    problem: Callable[..., Problem], name: str
) -> None:
    case = problem(name)
    method = case.method()
    with torch.inference_mode():
        expected = zero_shot_scores(case.base, case.prompts, "cpu")(case.images)
        torch.testing.assert_close(method.scores(case.prompts)(case.images), expected)


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "visual", "text", "clipood", "flyp", "kd", "lora"])
def test_the_result_is_a_model_that_loads(
    problem: Callable[..., Problem], name: str, tmp_path: Path
) -> None:
    case = problem(name, lr=1e-3)
    method = case.method()
    case.train(method, 2)
    method.finish(lambda: case.base)
    path = method.export(tmp_path, lambda: case.base)
    loaded = load_model(SMALL, str(path))
    with torch.inference_mode():
        expected = method.scores(case.prompts)(case.images)
        found = zero_shot_scores(loaded.model, case.prompts, "cpu")(case.images)
        assert torch.equal(found, expected)
        before = zero_shot_scores(case.base, case.prompts, "cpu")(case.images)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("name", ["zero-shot", "bitfit", *SPARSE])
def test_the_result_is_a_delta_that_applies(
    problem: Callable[..., Problem], name: str, tmp_path: Path
) -> None:
    case = problem(name, lr=1e-2)
    method = case.method()
    if find(name).trains:
        case.train(method, 2)
    method.finish(lambda: case.base)
    delta = SparseDelta.load(method.export(tmp_path, lambda: case.base))
    assert delta.metadata["method"] == name
    assert json.loads(delta.metadata["training"])["method"] == name
    model = copy.deepcopy(case.base)
    delta.apply_(model)
    assert differing(model, case.clip.model) == set()
    assert (delta.nnz == 0) == (name == "zero-shot")


@pytest.mark.parametrize("name", SPARSE)
def test_a_share_of_the_way_of_a_sparse_method(problem: Callable[..., Problem], name: str) -> None:
    """alpha: only selected entries, (1 - alpha) w0 + alpha w1, rounded once."""
    ends = {}
    for alpha in (1.0, 0.25, 0.0):
        case = problem(name, lr=1e-2, alpha=alpha)
        method = case.method()
        case.train(method, 3)
        method.finish(lambda case=case: case.base)
        ends[alpha] = {n: p.detach().double() for n, p in case.clip.model.named_parameters()}
    for param_name, param in case.base.named_parameters():
        start = param.detach().double()
        assert torch.equal(ends[0.0][param_name], start)
        expected = (start + 0.25 * (ends[1.0][param_name] - start)).float().double()
        assert torch.equal(ends[0.25][param_name], expected)


def test_masks_of_the_strategies_differ_and_have_the_same_size(
    problem: Callable[..., Problem],
) -> None:
    masks = {}
    for name in SPARSE:
        method: Any = problem(name, density=0.002).method()
        masks[name] = method.mask
    assert len({mask.nnz for mask in masks.values()}) == 1
    assert len({mask.fingerprint for mask in masks.values()}) == 4
    other: Any = problem("random", density=0.002, seed=2).method()
    assert other.mask != masks["random"]
    method = problem("magnitude", density=0.002).method()
    largest = max(p.flatten()[i.long()].abs().max() for _, p, i in method._selected())
    smaller = sum(int((p.abs() < largest).sum()) for p in method.encoder_parameters().values())
    assert smaller < masks["magnitude"].nnz


@pytest.mark.parametrize("name", [name for name in AVERAGED if name not in SPARSE])
def test_a_share_of_the_way_of_a_dense_method(problem: Callable[..., Problem], name: str) -> None:
    """alpha: everything that is trained, and nothing else, is the average of both ends."""
    ends = {}
    for alpha in (1.0, 0.25, 0.0):
        case = problem(name, lr=1e-3, alpha=alpha)
        method: Any = case.method()
        start = {n: p.detach().clone() for n, p in method.params.items()}
        torch.manual_seed(1)  # flyp draws captions
        case.train(method, 3)
        method.finish(lambda case=case: case.base)
        ends[alpha] = {n: p.detach().clone() for n, p in method.params.items()}
        assert differing(case.base, case.clip.model) <= (set(start) if alpha else set())
    assert all(torch.equal(value, start[n]) for n, value in ends[0.0].items())
    assert any(not torch.equal(value, start[n]) for n, value in ends[1.0].items())
    for n, value in ends[0.25].items():
        torch.testing.assert_close(value, 0.75 * ends[0.0][n] + 0.25 * ends[1.0][n])


def test_wise_ft_averages_the_head_too(problem: Callable[..., Problem]) -> None:
    case = problem("wise-ft", lr=1e-3)
    method: Any = case.method()
    first = method.head.detach().clone()
    case.train(method, 3)
    last = method.head.detach().clone()
    assert not torch.equal(first, last)
    method.finish(lambda: case.base)
    torch.testing.assert_close(method.head.detach(), (first + last) / 2)


@pytest.mark.parametrize("name", AVERAGED)
def test_the_way_can_be_gone_up_and_down(problem: Callable[..., Problem], name: str) -> None:
    """Its ends to the bit, whatever came before; in between what ``--alpha`` gives."""
    case = problem(name, lr=1e-2, alpha=0.25)
    method = case.method()
    start = {n: p.detach().clone() for n, p in method.results()}
    case.train(method, 3)
    trained = {n: p.detach().clone() for n, p in method.results()}
    go = method.way(lambda: case.base)
    for alpha, expected in (
        (0.0, start),
        (1.0, trained),
        (0.5, None),
        (0.0, start),
        (1.0, trained),
    ):
        go(alpha)
        if expected is not None:
            assert all(torch.equal(p, expected[n]) for n, p in method.results())
    go(0.25)
    between = {n: p.detach().clone() for n, p in method.results()}
    go(1.0)
    method.finish(lambda: case.base)
    assert all(torch.equal(p, between[n]) for n, p in method.results())
    assert not all(torch.equal(p, start[n]) for n, p in method.results())


# Heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lp", "lp-ft", "wise-ft"])
def test_known_classes_are_scored_by_the_head_and_others_by_their_prompts(
    problem: Callable[..., Problem], name: str
) -> None:
    case = problem(name, lr=1e-2)
    method: Any = case.method()
    case.train(method, 3)
    prompts = ClassPrompts(OTHERS, ("a {}.",), case.clip.tokenizer)
    with torch.inference_mode():
        scores = method.scores(prompts)(case.images)
        features = image_features(case.clip.model, case.images)
        zero_shot = features @ embed_classes(case.clip.model, prompts.tokens).T
        head = features @ method.head.T / case.base.logit_scale.exp()
    torch.testing.assert_close(scores[:, 0], zero_shot[:, 0])
    torch.testing.assert_close(scores[:, 1], head[:, NAMES.index("dog")])


def test_two_classes_of_one_name_have_rows_of_their_own(problem: Callable[..., Problem]) -> None:
    case = problem("lp", lr=1e-2)
    case.prompts = ClassPrompts(("cat", "cat", "dog"), ("a {}.",), case.clip.tokenizer)
    method: Any = case.method()
    case.train(method, 3)
    with torch.inference_mode():
        scores = method.scores(case.prompts)(case.images)
    assert not torch.equal(scores[:, 0], scores[:, 1])


def test_the_probe_of_lp_ft_leaves_the_encoder_and_is_kept(
    problem: Callable[..., Problem], tmp_path: Path
) -> None:
    case = problem("lp-ft", probe_lr=1e-1)
    method: Any = case.method(tmp_path)
    assert differing(case.clip.model, case.base) == set()
    first = embed_classes(case.base, case.prompts.tokens)
    features = image_features(case.base, case.images)
    first = case.base.logit_scale.exp() * first
    before, after = (
        F.cross_entropy(features @ head.T, case.labels) for head in (first, method.head)
    )
    assert after < before
    again: Any = problem("lp-ft", probe_lr=1e-1, probe_epochs=1).method(tmp_path)
    assert torch.equal(again.head, method.head)  # it was there already
    fresh: Any = problem("lp-ft", probe_lr=1e-1).method()
    assert torch.equal(fresh.head, method.head)
    other = save_adapter(tmp_path / "x", {"y": torch.ones(1)}, {}, case.prompts).read_bytes()
    for content in (other, other[:20], b""):
        (tmp_path / "probe.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="is no probe of this run: delete it"):
            problem("lp-ft").method(tmp_path)


# Losses -------------------------------------------------------------------------------------------


def test_flyp_loss_of_a_case_by_hand() -> None:
    """Two pairs, unit vectors: cosines 1, 0.6 / 0, 0.8; scale 2."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    rows = -math.log(math.exp(2) / (math.exp(2) + math.exp(1.2))) - math.log(
        math.exp(1.6) / (math.exp(0) + math.exp(1.6))
    )
    columns = -math.log(math.exp(2) / (math.exp(2) + math.exp(0))) - math.log(
        math.exp(1.6) / (math.exp(1.2) + math.exp(1.6))
    )
    found = contrastive_loss(images, texts, torch.tensor(2.0))
    assert float(found) == pytest.approx((rows + columns) / 4)


def test_flyp_needs_two_images(problem: Callable[..., Problem]) -> None:
    with pytest.raises(ConfigError, match="contrasts images: give a --batch-size of 2 or more"):
        problem("flyp", batch_size=1).method()


def test_flyp_captions_are_of_the_images_classes(
    problem: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem("flyp")
    method = case.method()
    seen: list[Tensor] = []
    from saft_clip.methods import flyp

    encode = flyp.encode_prompts
    monkeypatch.setattr(flyp, "encode_prompts", lambda m, t: seen.append(t) or encode(m, t))
    for seed in range(8):
        torch.manual_seed(seed)
        method.loss(case.images, case.labels)
    drawn = torch.stack(seen)
    for caption, label in zip(drawn[0], case.labels.tolist(), strict=True):
        assert any(torch.equal(caption, own) for own in case.prompts.tokens[label])
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])


def test_clipoods_loss_of_a_case_by_hand() -> None:
    """f = t_0, <t_0, t_1> = 0.6, margin 0.5: logits 1 and 0.6 + 0.5 * 0.4."""
    classes = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    features = torch.tensor([[1.0, 0.0]])
    logits = [3 * 1.0, 3 * (0.6 + 0.5 * 0.4)]
    expected = -math.log(math.exp(logits[0]) / sum(map(math.exp, logits)))
    found = margin_loss(features, torch.tensor([0]), classes, torch.tensor(3.0), 0.5)
    assert float(found) == pytest.approx(expected)
    plain = F.cross_entropy(3 * features @ classes.T, torch.tensor([0]))
    assert torch.equal(
        margin_loss(features, torch.tensor([0]), classes, torch.tensor(3.0), 0), plain
    )
    assert found > plain


def test_clipoods_result_is_the_average_weighted_by_beta(problem: Callable[..., Problem]) -> None:
    case = problem("clipood", lr=1e-2, beta=0.5)
    method: Any = case.method()
    way = [{n: p.detach().double().clone() for n, p in method.params.items()}]
    for step in range(4):
        case.train(method, 1, start=step, total=4)
        way.append({n: p.detach().double().clone() for n, p in method.params.items()})
    x = [(t + 0.5) / 5 for t in range(5)]
    density = [1 / (math.pi * math.sqrt(each * (1 - each))) for each in x]  # of Beta(1/2, 1/2)
    assert [beta_density(each, 0.5) for each in x] == pytest.approx(density, rel=1e-5)
    method.finish(lambda: case.base)
    for name, param in method.params.items():
        expected = sum(w * each[name] for w, each in zip(density, way, strict=True)) / sum(density)
        torch.testing.assert_close(param.double(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(param.double(), way[-1][name])


def test_a_density_too_small_for_a_number_is_no_error(problem: Callable[..., Problem]) -> None:
    """Then the newest weights, of much greater density, are the average so far."""
    case = problem("clipood", beta=1000.0, lr=1e-2)
    method: Any = case.method()
    case.train(method, 2, total=10**6)
    method.finish(lambda: case.base)
    assert all(param.isfinite().all() for param in method.params.values())


def test_penalties_are_distances_to_the_start(problem: Callable[..., Problem]) -> None:
    for name, distance in (
        ("l2sp", lambda d: d.square().sum() / 2),
        ("l1sp", lambda d: d.abs().sum()),
    ):
        case = problem(name, penalty=0.3)
        method: Any = case.method()
        plain = prompt_loss(case.base, case.images, case.labels, case.prompts.tokens, "fp32")
        assert torch.equal(method.loss(case.images, case.labels), plain)
        with torch.no_grad():
            for param in method.params.values():
                param += 0.01 * torch.randn_like(param)
        own = dict(case.base.named_parameters())
        expected = sum(distance(p.double() - own[n]) for n, p in method.params.items())
        tokens = case.prompts.tokens
        plain = prompt_loss(case.clip.model, case.images, case.labels, tokens, "fp32")
        found = method.loss(case.images, case.labels) - plain
        torch.testing.assert_close(found.double(), 0.3 * expected, rtol=1e-4, atol=1e-6)
        assert case.config.wd == 0.0


def test_distillation_loss_of_a_case_by_hand() -> None:
    """T = 2: probabilities of (2, 0) / 2 and of (0, 0) / 2."""
    p = math.exp(1) / (math.exp(1) + 1)
    expected = 4 * (p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5))
    found = distillation_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), 2.0)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    twice = distillation_loss(torch.zeros(2, 2), torch.tensor([[2.0, 0.0]] * 2), 2.0)
    assert float(twice) == pytest.approx(expected, rel=1e-6)


def test_distillation_keeps_the_answers(problem: Callable[..., Problem]) -> None:
    """With a heavy weight, answers stay nearer the pretrained model's than without."""
    changes = []
    for penalty in (0.0, 100.0):
        case = problem("kd", lr=1e-3, penalty=penalty)
        method = case.method()
        for _ in range(20):
            method.loss(case.images, case.labels).backward()
            method.step(1e-3)
        with torch.inference_mode():
            before = zero_shot_scores(case.base, case.prompts, "cpu")(case.images)
            changes.append((method.scores(case.prompts)(case.images) - before).abs().mean())
    assert changes[1] < changes[0]


# LoRA ---------------------------------------------------------------------------------------------


def test_lora_adapts_fused_attention_and_mlps_of_both_encoders(
    problem: Callable[..., Problem],
) -> None:
    case = problem("lora", rank=2, lr=1e-2)
    method: Any = case.method()
    layers = [name for kind in adaptable_layers(case.base) for name in kind]
    assert any("visual" in name and name.endswith("attn") for name in layers)
    assert any("visual" not in name and name.endswith("attn") for name in layers)
    case.train(method, 1)
    case.train(method, 1, start=1)
    assert all(param.abs().sum() > 0 for name, param in method.params.items() if "lora_B" in name)
    method.finish(lambda: case.base)
    changed = differing(case.clip.model, case.base)
    weights = {n for n, p in case.base.named_parameters() if p.dim() == 2 and "embed" not in n}
    for layer in layers:
        assert any(name.startswith(layer) for name in changed), layer
    assert changed <= weights
    assert sum(method.trained.values()) == sum(p.numel() for p in method.params.values())
    own = dict(case.base.named_parameters())
    for name in changed:
        change = dict(case.clip.model.named_parameters())[name] - own[name]
        assert torch.linalg.matrix_rank(change.detach().double(), rtol=1e-4) <= 2 * (
            3 if "in_proj" in name else 1
        )


def test_loras_frozen_weights_keep_their_bits(problem: Callable[..., Problem]) -> None:
    """Through many passes, forward and backward, of both kinds of layers."""
    case = problem("lora", lr=1e-2)
    method: Any = case.method()
    case.train(method, 20)
    own = dict(case.base.named_parameters())
    seen = set()
    for name, param in case.clip.model.named_parameters():
        original = name.replace("parametrizations.", "").removesuffix(".original")
        original = original.replace(".base_layer", "")
        if original in own:
            assert torch.equal(param, own[original]), name
            seen.add(original)
    assert seen == own.keys()


def test_why_attention_is_not_pefts() -> None:
    """As docs/methods.md says, frozen weights are others after one pass; if not, use PEFT's."""
    from peft import LoraConfig, LoraModel

    torch.manual_seed(0)
    model = nn.Module()
    model.attention = nn.MultiheadAttention(64, 4, batch_first=True)
    before = model.attention.in_proj_weight.detach().clone()
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["attention"])
    LoraModel(model, {"default": config}, "default")
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.02)
    x = torch.randn(2, 5, 64)
    model.attention(x, x, x)
    share = (model.attention.base_layer.in_proj_weight != before).double().mean()
    assert 0.1 < share < 0.25


def test_lora_encodes_prompts_without_their_padding(problem: Callable[..., Problem]) -> None:
    case = problem("lora", lr=1e-2)
    method = case.method()
    case.train(method, 2)
    model: Any = case.clip.model
    assert padding_reason(model) is None
    with torch.no_grad():
        padded = F.normalize(model.encode_text(case.prompts.tokens.flatten(0, 1)), dim=-1)
        packed = encode_prompts(model, case.prompts.tokens.flatten(0, 1))
    torch.testing.assert_close(packed, padded)


def test_lora_of_a_resnet(tmp_path: Path) -> None:
    """Its attention pooling takes weights of layers that it never calls: these are left out."""
    file = str(small_checkpoint(tmp_path / "resnet.safetensors", SMALL_RESNET))
    clip = load_model(SMALL_RESNET, file)
    attention, linear = adaptable_layers(clip.model)
    assert not any("attnpool" in name for name in attention + linear)
    assert attention


def test_lora_says_what_it_does_not_reach(problem: Callable[..., Problem]) -> None:
    """A layer whose weights are used, but not its forward, would silently not be trained."""
    case = problem("lora")
    case.clip.model.idle = nn.Linear(3, 3)
    method = case.method()
    method.loss(case.images, case.labels).backward()
    with pytest.raises(ConfigError, match="does not reach 'idle"):
        method.clip_grad_norm_(1.0)


# Prompts ------------------------------------------------------------------------------------------


def test_coops_context_stands_in_front_of_the_name(problem: Callable[..., Problem]) -> None:
    """With the embeddings of words as context, the features are those of the words."""
    case = problem("coop", context=2)
    method: Any = case.method()
    tokenizer, model = case.clip.tokenizer, case.clip.model
    words = tokenizer(["some nice"])[0, 1:3]
    with torch.no_grad():
        method.context.copy_(model.token_embedding(words))
        found = method.frame.encode(method.context)
        texts = tokenizer([f"some nice {name}." for name in NAMES])
        expected = F.normalize(model.encode_text(texts), dim=-1)
    torch.testing.assert_close(found, expected)


def test_coop_has_so_many_vectors_and_starts_small(problem: Callable[..., Problem]) -> None:
    method: Any = problem("coop", context=4).method()
    width = method.model.positional_embedding.shape[1]
    assert method.trained == {"adapter.context": 4 * width}
    assert 0.015 < float(method.context.detach().std()) < 0.025
    assert FinetuneConfig(train_data="x", method="coop").context == 16
    other: Any = problem("coop", context=4, seed=2).method()
    assert not torch.equal(other.context, method.context)


def test_names_that_are_too_long_for_the_context(problem: Callable[..., Problem]) -> None:
    """The small model has 16 tokens: 4 vectors, start, stop and end leave 9 for a name."""
    method = problem("coop", context=4).method()
    method.check_classes([("w " * 9).strip(), "a-long-name"])  # just fits
    with pytest.raises(ConfigError, match=r"name 'w w w .*' is too long for 4 learned words in 16"):
        method.check_classes(["a rather long name of few tokens", ("w " * 10).strip()])
    problem("coop", context=12).method()
    with pytest.raises(ConfigError, match=r"leaves no room for a class name .* give at most 12"):
        problem("coop", context=13).method()


def test_cocoop_moves_the_context_by_the_image(problem: Callable[..., Problem]) -> None:
    case = problem("cocoop")
    method: Any = case.method()
    tokens = case.clip.tokenizer(["a photo of a"])[0, 1:5]
    assert torch.equal(method.context, case.base.token_embedding(tokens))
    size = case.base.visual.output_dim
    assert method.trained["adapter.network.0.weight"] == size * max(1, size // 16)
    with torch.inference_mode():
        alone = torch.cat([method.scores(case.prompts)(image[None]) for image in case.images])
        together = method.scores(case.prompts)(case.images)
        torch.testing.assert_close(alone, together)
        method.network[2].weight.zero_()
        method.network[2].bias.zero_()
        still = method.scores(case.prompts)(case.images)
        texts = case.clip.tokenizer([f"a photo of a {name}." for name in NAMES])
        classes = F.normalize(case.base.encode_text(texts), dim=-1)
        torch.testing.assert_close(still, image_features(case.base, case.images) @ classes.T)
    assert not torch.allclose(still, together)


def test_maple_puts_prompts_into_both_encoders(problem: Callable[..., Problem]) -> None:
    case = problem("maple", context=2, depth=2)
    method: Any = case.method()
    width = case.base.visual.transformer.width
    assert [layer.out_features for layer in method.couplings] == [width, width]
    lengths: list[int] = []
    for block in case.clip.model.visual.transformer.resblocks:
        block.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    with torch.inference_mode():
        plain = image_features(case.clip.model, case.images)
        assert torch.equal(plain, image_features(case.base, case.images))
        without = lengths.copy()
        lengths.clear()
        prompted = method.image_features(case.images)
    assert lengths == [length + 2 for length in without]
    assert not torch.allclose(plain, prompted)


def test_maples_deep_prompts_replace_what_came_out_before(problem: Callable[..., Problem]) -> None:
    """What stands in a prompt's place after the first block has no influence behind the second."""
    case = problem("maple", context=2, depth=2)
    method: Any = case.method()
    blocks = case.clip.model.visual.transformer.resblocks
    with torch.inference_mode():
        expected = method.image_features(case.images)

        def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, -2:] = 7.0
            return output

        handle = blocks[0].register_forward_hook(spoil)
        assert torch.equal(method.image_features(case.images), expected)
        handle.remove()
        blocks[1].register_forward_hook(spoil)
        if len(blocks) > 2:
            assert not torch.equal(method.image_features(case.images), expected)


def test_maples_vectors_start_differently_where_there_are_no_words(
    problem: Callable[..., Problem],
) -> None:
    method: Any = problem("maple", context=5).method()
    for vectors in method.vectors:
        assert len(vectors.detach().unique(dim=0)) == 5


def test_maple_has_no_more_depth_than_blocks(problem: Callable[..., Problem]) -> None:
    with pytest.raises(ConfigError, match=r"--depth 99 is more than the . blocks of .* at most"):
        problem("maple", depth=99).method()


# Cost ---------------------------------------------------------------------------------------------


#: In a process of its own, whose peak is not that of what ran before it.
PEAK_OF_A_PROCESS = """
import torch
from saft_clip.peak_memory import PeakMemory

held = torch.ones(1 << 26)  # 256 MiB, so that the peak is now, whether it can be set back or not
peak = PeakMemory(torch.device("cpu"))
before = peak.bytes()
more = torch.ones(1 << 24)
print(peak.bytes() - before, more.nbytes)
"""


def test_peak_memory_of_a_process() -> None:
    command = [sys.executable, "-c", PEAK_OF_A_PROCESS]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    grown, allocated = map(int, answer.stdout.split())
    assert allocated / 2 < grown < 2 * allocated


def test_peak_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77)
    assert PeakMemory(torch.device("cuda", 1)).bytes() == 77
    assert asked == [torch.device("cuda", 1)]


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lp", "lp-ft", "wise-ft", "coop", "cocoop", "maple"])
def test_an_adapter_holds_what_was_trained(
    problem: Callable[..., Problem], name: str, tmp_path: Path
) -> None:
    case = problem(name, lr=1e-2)
    method: Any = case.method()
    case.train(method, 2)
    method.finish(lambda: case.base)
    path = method.export(tmp_path, lambda: case.base)
    adapter = load_adapter(path)
    assert adapter.names == NAMES
    assert adapter.templates == case.prompts.templates
    assert adapter.texts["method"] == name
    assert adapter.texts["base"] == fingerprint_of(case.base)
    assert adapter.tensors.keys() == method.params.keys()
    assert all(torch.equal(value, method.params[key]) for key, value in adapter.tensors.items())
    first = path.read_bytes()
    method.export(tmp_path, lambda: case.base)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "is broken"), (b"x" * 100, "is broken"), (None, "cannot be read: No such file")],
)
def test_files_that_are_no_adapters(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence) as error:
        load_adapter(path)
    assert str(path) in str(error.value)


def test_another_safetensors_file_is_no_adapter(
    problem: Callable[..., Problem], tmp_path: Path
) -> None:
    case = problem("full")
    method = case.method()
    path = method.export(tmp_path, lambda: case.base)
    assert load_file(path)
    with pytest.raises(CheckpointError, match="is no file of saft finetune's"):
        load_adapter(path)

"""The built-in tiny CLIP: a real open_clip model, its weights, its card, and its pretraining."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from typer import Typer
from typer.testing import CliRunner

from saft_clip import pretrain_tiny
from saft_clip.domains import DOMAINS
from saft_clip.domains.glyphs import DIGITS, LETTERS, glyph_fields
from saft_clip.errors import CheckpointError, ConfigError
from saft_clip.models import load_model
from saft_clip.pretrain_tiny import CLASSES, Pool, Settings, Trainer, class_aware_loss
from saft_clip.tiny import TINY_CARD, TINY_NAME, TINY_WEIGHTS, register_tiny

BRIEF = Settings(steps=4, text_steps=1, batch_size=8, warmup=1)


@pytest.fixture(scope="module")
def card() -> dict:
    return json.loads(TINY_CARD.read_text())


@pytest.fixture(scope="module")
def pools() -> tuple[Pool, ...]:
    """Shapes that are quicker to draw than those of the real pretraining."""
    fields, labels = glyph_fields("val", LETTERS)
    return (Pool(fields.half(), labels + len(DIGITS)),) * 3


def test_loads_through_plain_open_clip() -> None:
    register_tiny()
    register_tiny()
    model, _, preprocess = open_clip.create_model_and_transforms(
        TINY_NAME, pretrained=str(TINY_WEIGHTS)
    )
    stored = load_file(TINY_WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float()), name
        assert tensor.isfinite().all(), name
    assert preprocess.transforms[0].size == 32
    assert open_clip.get_tokenizer(TINY_NAME)(["the digit 7."]).shape == (1, 16)


def test_size_is_what_was_asked_for(card: dict) -> None:
    model = load_model(TINY_NAME).model
    parameters = sum(p.numel() for p in model.parameters())
    assert 2e6 <= parameters <= 6e6
    assert model.token_embedding.weight.shape[0] == 49408
    assert model.token_embedding.weight.numel() > parameters / 2
    assert TINY_WEIGHTS.stat().st_size <= 12e6
    assert card["parameters"] == parameters


def test_card_holds_every_domain_and_reaches_the_goals(card: dict) -> None:
    accuracy = {name: result["top1"] for name, result in card["zero_shot"].items()}
    assert list(accuracy) == list(DOMAINS)
    goals = {"mnist": 0.85, "uci": 0.85, "fonts": 0.90, "letters": 0.90}
    assert {name: accuracy[name] for name, goal in goals.items() if accuracy[name] < goal} == {}
    assert all(value > 0.5 for value in accuracy.values())


@pytest.mark.parametrize("name", ["fonts", "letters"])
def test_card_is_what_the_weights_give(name: str, card: dict) -> None:
    clip = load_model(TINY_NAME)
    result = pretrain_tiny.evaluate_domains(clip, (name,), "test")[name]
    claimed = card["zero_shot"][name]
    assert result.n == claimed["images"]
    # Another CPU may round otherwise and turn a close call: two images of a thousand.
    assert result.top1 == pytest.approx(claimed["top1"], abs=0.002)


def test_captions_fit_the_context_and_differ_between_classes() -> None:
    captions = pretrain_tiny.caption_tokens()
    assert len(captions) == len(CLASSES) == 36
    end = 49407
    assert all((tokens == end).any(1).all() for tokens in captions)
    rows = {tuple(row.tolist()): label for label, t in enumerate(captions) for row in t}
    for label, tokens in enumerate(captions):
        assert all(rows[tuple(row.tolist())] == label for row in tokens)


def test_loss_is_plain_contrastive_with_one_image_per_class() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    plain = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss = class_aware_loss(logits, labels, torch.zeros(5, 5, dtype=torch.bool))
    torch.testing.assert_close(loss, plain)


def test_loss_does_not_push_apart_images_of_one_class() -> None:
    logits = torch.tensor([[9.0, -9.0], [9.0, -9.0], [-9.0, 9.0]])
    labels = torch.tensor([0, 0, 1])
    loss = class_aware_loss(logits, labels, torch.zeros(2, 2, dtype=torch.bool))
    # The caption of class 0 must share its weight between two images: (log 2 + 0) / 2 / 2.
    assert loss.item() == pytest.approx(math.log(2) / 4, abs=1e-6)


def test_lookalikes_are_no_negatives_of_each_other() -> None:
    mask = pretrain_tiny.lookalike_mask()
    zero, letter = CLASSES.index("0"), CLASSES.index("O")
    assert torch.equal(mask, mask.T)
    assert mask[zero, letter]
    assert not mask.diagonal().any()
    logits = torch.zeros(2, len(CLASSES), requires_grad=True)
    class_aware_loss(logits, torch.tensor([zero, letter]), mask).backward()
    assert logits.grad is not None
    assert logits.grad[0, letter] == 0
    assert logits.grad[1, zero] == 0
    assert logits.grad[0, CLASSES.index("Q")] > 0


def test_text_warm_start_separates_the_classes() -> None:
    trainer = Trainer(replace(BRIEF, text_steps=30))
    assert trainer.warm_text() < 0.3


def test_pretraining_is_reproducible_and_resumes_bit_for_bit(
    tmp_path: Path, pools: tuple[Pool, ...]
) -> None:
    whole, again = Trainer(BRIEF), Trainer(BRIEF)
    for trainer in (whole, again):
        trainer.warm_text()
        trainer.train_step(pools)
        trainer.train_step(pools)
    path = tmp_path / "state.safetensors"
    again.save_checkpoint(path)
    resumed = Trainer.from_checkpoint(path)
    assert resumed.step == 2
    for trainer in (whole, resumed):
        trainer.train_step(pools)
        trainer.train_step(pools)
    expected, found = whole.average.state_dict(), resumed.average.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


@pytest.mark.parametrize("content", [b"", b"\xff" * 64], ids=["empty", "noise"])
def test_broken_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint.*without --resume"):
        Trainer.from_checkpoint(path)


def test_time_limit_stops_and_checkpoints(
    tmp_path: Path, pools: tuple[Pool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_tiny, "build_pools", lambda: pools)
    trainer = Trainer(BRIEF)
    path = tmp_path / "state.safetensors"
    pretrain_tiny.pretrain(trainer, minutes=0.0, checkpoint=path)
    assert trainer.step == 1
    assert Trainer.from_checkpoint(path).step == 1


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="--steps or --batch-size"):
        replace(BRIEF, batch_size=2).check()


def test_command_explains_itself_and_its_errors() -> None:
    app = Typer()
    app.command()(pretrain_tiny.main)
    runner = CliRunner()
    assert "stand-in" in runner.invoke(app, ["--help"]).output
    result = runner.invoke(app, ["--resume"])
    assert result.exit_code == 1
    assert "--resume needs --checkpoint" in result.output
    assert "Traceback" not in result.output

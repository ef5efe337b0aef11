"""Zero-shot evaluation: against open_clip's own classifier, and against cases counted by hand."""

import json
import os
import shutil
from math import sqrt
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from clip_helpers import SMALL, cut_short, small_checkpoint, write_folder
from saft_clip.data import ImageDataset, load_dataset
from saft_clip.errors import DataError
from saft_clip.evaluate import embed_classes, evaluate_zero_shot
from saft_clip.models import ClipModel, load_model
from saft_clip.prompts import class_prompts


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    file = small_checkpoint(tmp_path_factory.mktemp("weights") / "small.safetensors")
    return load_model(SMALL, str(file))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "things", {"ant": 4, "bee": 3, "big_cat": 5})


def load(clip, folder, **options):
    return load_dataset(str(folder), "test", clip.preprocess_val, **options)


class Stub(nn.Module):
    """A text whose token is c points along axis c; an image is its own embedding."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def encode_text(self, tokens):
        return nn.functional.one_hot(tokens[:, 0], self.classes).float()

    def encode_image(self, images):
        return images


class Rows(ImageDataset):
    """Rows of scores in place of images."""

    def __getitem__(self, index):
        return torch.tensor(self.images[index]), int(self.labels[index])


def stub(scores, labels, classes):
    """A model that gives these scores, and the data set with these labels."""

    def tokenizer(texts):
        return torch.tensor([[int(text)] for text in texts])

    names = tuple(map(str, range(classes)))
    return (
        ClipModel(Stub(classes), None, None, tokenizer, "stub", None),
        Rows("rows", scores, torch.tensor(labels), names, ("{}",), None),
    )


def test_class_embeddings_equal_open_clips(clip):
    names, templates = ["ant", "big cat"], ["a photo of a {}.", "a {}", "the {} again"]
    tokens = class_prompts(names, templates, clip.tokenizer)
    with torch.no_grad():
        ours = embed_classes(clip.model, tokens)
    theirs = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, names, templates).T
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_accuracy_equals_open_clips(clip, folder):
    dataset = load(clip, folder, templates="simple")
    result = evaluate_zero_shot(clip, dataset, batch_size=5)
    classes = open_clip.build_zero_shot_classifier(
        clip.model, clip.tokenizer, dataset.class_names, open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    with torch.no_grad():
        predicted = (clip.model.encode_image(images, normalize=True) @ classes).argmax(dim=1)
    assert result.n == 12
    assert result.top1 == (predicted == dataset.labels).double().mean().item()


def test_metrics_counted_by_hand():
    scores = [
        [0.9, 0.1, 0.0],  # 0: right
        [0.2, 0.8, 0.0],  # 0: second
        [0.1, 0.8, 0.5],  # 1: right
        [0.1, 0.8, 0.5],  # 1: right
        [0.1, 0.8, 0.5],  # 1: right
        [0.9, 0.2, 0.3],  # 1: last
    ]
    clip, dataset = stub(scores, [0, 0, 1, 1, 1, 1], 3)
    result = evaluate_zero_shot(clip, dataset, batch_size=4)
    assert result.n == 6
    assert result.top1 == pytest.approx(4 / 6)
    assert result.top5 == 1.0
    assert result.per_class == {"0": 0.5, "1": 0.75, "2": None}
    assert result.per_class_n == {"0": 2, "1": 4, "2": 0}
    assert result.mean_per_class == pytest.approx((0.5 + 0.75) / 2)
    assert result.top1_stderr == pytest.approx(sqrt(4 / 6 * 2 / 6 / 6))
    assert result.mean_per_class_stderr == pytest.approx(sqrt(0.25 / 2 + 0.1875 / 4) / 2)


def test_top5_of_more_than_five_classes():
    ladder = [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    clip, dataset = stub([ladder] * 7, list(range(7)), 7)
    result = evaluate_zero_shot(clip, dataset)
    assert result.top1 == pytest.approx(1 / 7)
    assert result.top5 == pytest.approx(5 / 7)


def test_ties_and_nan_do_not_count_as_right():
    clip, dataset = stub([[0.5, 0.5], [float("nan"), 0.5], [1.0, 0.0]], [0, 0, 0], 2)
    assert evaluate_zero_shot(clip, dataset).top1 == pytest.approx(1 / 3)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (5, 0), (64, 0), (5, 2)])
def test_result_does_not_depend_on_batches_and_workers(clip, folder, batch_size, workers):
    dataset = load(clip, folder)
    expected = evaluate_zero_shot(clip, dataset, batch_size=3)
    result = evaluate_zero_shot(clip, dataset, batch_size=batch_size, workers=workers)
    assert result == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_skipped_and_named(clip, folder, workers):
    for name in ("bee/001.png", "bee/002.png"):
        cut_short(folder / name)
    result = evaluate_zero_shot(clip, load(clip, folder), batch_size=1, workers=workers)
    assert result.n == 10
    assert result.per_class_n == {"ant": 4, "bee": 1, "big cat": 5}
    assert [line.split(": ")[0] for line in result.skipped] == [
        str(folder / "bee" / "001.png"),
        str(folder / "bee" / "002.png"),
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_file_names_that_are_not_utf8(clip, folder, workers, capsys):
    good, bad = (os.fsencode(folder / "bee") + name for name in (b"/\xff\xfe.png", b"/\xff.png"))
    shutil.copy(folder / "bee" / "000.png", good)
    Path(os.fsdecode(bad)).write_text("this is no image")
    result = evaluate_zero_shot(clip, load(clip, folder), workers=workers)
    assert result.n == 13
    assert [line.split(": ")[0] for line in result.skipped] == [rf"{folder}/bee/\udcff.png"]
    assert r"\udcff.png" in capsys.readouterr().err


def test_warning_of_unreadable_images(clip, folder, capsys):
    cut_short(folder / "bee" / "001.png")
    evaluate_zero_shot(clip, load(clip, folder), show_progress=False)
    assert capsys.readouterr().err == ""
    evaluate_zero_shot(clip, load(clip, folder))
    assert "1 unreadable image(s) of things skipped" in capsys.readouterr().err


def test_no_readable_image(clip, tmp_path):
    folder = write_folder(tmp_path / "bad", {"a": 1})
    cut_short(folder / "a" / "000.png")
    with pytest.raises(DataError, match="none of the 1 images of bad can be read"):
        evaluate_zero_shot(clip, load(clip, folder))


def test_modes_weights_and_gradients_are_left_alone(clip, folder):
    clip.model.train()
    clip.model.visual.ln_pre.eval()
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    evaluate_zero_shot(clip, load(clip, folder), precision="amp_bf16")
    assert clip.model.training
    assert clip.model.transformer.training
    assert not clip.model.visual.ln_pre.training
    assert all(torch.equal(v, before[name]) for name, v in clip.model.state_dict().items())
    assert all(p.grad is None for p in clip.model.parameters())
    clip.model.eval()


def test_bf16_autocast_is_used_and_close(clip, folder):
    dataset = load(clip, folder)
    seen = []
    handle = clip.model.visual.transformer.register_forward_hook(
        lambda _, __, result: seen.append(torch.is_autocast_enabled("cpu"))
    )
    with handle:
        evaluate_zero_shot(clip, dataset, precision="amp_bf16")
        evaluate_zero_shot(clip, dataset)
    assert seen == [True, False]


def test_near_classes_do_not_tie_under_autocast():
    """In bf16 these scores would be equal, and a tie counts as wrong."""
    clip, dataset = stub([[1.0, 1.001, 0.999]], [1], classes=3)
    assert evaluate_zero_shot(clip, dataset, precision="amp_bf16").top1 == 1.0


def test_result_is_json(clip, folder):
    result = evaluate_zero_shot(clip, load(clip, folder))
    content = json.loads(json.dumps(result.to_dict()))
    assert content["dataset"] == "things"
    assert content["per_class"]["big cat"] == result.per_class["big cat"]

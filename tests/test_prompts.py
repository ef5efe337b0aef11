"""Prompt templates, tokens and text embeddings."""

import open_clip
import pytest
import torch
from torch.nn import functional as F

from clip_helpers import SMALL
from saft_clip import prompts
from saft_clip.errors import DataError
from saft_clip.prompts import class_prompts, encode_prompts, resolve_templates


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return open_clip.create_model(SMALL).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.get_tokenizer(SMALL)


def test_named_sets_equal_open_clips():
    for name, shipped in (
        ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        resolved = resolve_templates(name)
        assert [t.replace("{}", "newt") for t in resolved] == [t("newt") for t in shipped]


def test_literal_file_and_list(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("# sketches\n\na sketch of a {}.\n  a {} drawn badly\n")
    assert resolve_templates("a {}!") == ("a {}!",)
    assert resolve_templates(str(file)) == ("a sketch of a {}.", "a {} drawn badly")
    assert resolve_templates(["one {}", str(file)]) == (
        "one {}",
        "a sketch of a {}.",
        "a {} drawn badly",
    )
    assert len(resolve_templates(["one {}", "simple"])) == 8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no such file", "there are no prompt templates 'no such file'"),
        ("a {name}", r"'a \{name\}' has no \{\}"),
        ([], "list of prompt templates is empty"),
        (["fine {}", "not fine"], "there are no prompt templates 'not fine'"),
    ],
)
def test_bad_templates_are_named(spec, message):
    with pytest.raises(DataError, match=message):
        resolve_templates(spec)


def test_bad_files_of_templates(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("# nothing here\n")
    with pytest.raises(DataError, match=r"templates.txt holds no prompt template"):
        resolve_templates(str(file))
    file.write_text("a {}\na photo\n")
    with pytest.raises(DataError, match=r"'a photo' has no .*templates.txt"):
        resolve_templates(str(file))


def test_class_prompts_are_class_major(tokenizer):
    tokens = class_prompts(["cat", "dog {x}"], ["a {}", "two {} here"], tokenizer)
    assert tokens.shape == (2, 2, 16)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[1], tokenizer(["a dog {x}", "two dog {x} here"]))


def test_encode_prompts_is_the_normalised_text_embedding(model, tokenizer):
    tokens = tokenizer(["one", "two", "three"])
    with torch.no_grad():
        expected = F.normalize(model.encode_text(tokens), dim=-1)
        torch.testing.assert_close(encode_prompts(model, tokens), expected, rtol=0, atol=1e-6)


def test_encode_prompts_in_batches_is_the_same_and_differentiable(model, tokenizer, monkeypatch):
    tokens = tokenizer([f"number {i}" for i in range(5)])
    whole = encode_prompts(model, tokens)
    monkeypatch.setattr(prompts, "TOKEN_BATCH", 9)
    parts = encode_prompts(model, tokens)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(parts[:, 0].sum(), model.text_projection)
    (expected,) = torch.autograd.grad(whole[:, 0].sum(), model.text_projection)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_encode_prompts_returns_float32_under_autocast(model, tokenizer):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = encode_prompts(model, tokenizer(["one"]))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(1), rtol=0, atol=1e-6)

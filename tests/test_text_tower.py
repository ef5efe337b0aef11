"""Packed prompts: the features and all gradients of the padded ones."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from saft_clip.prompts import class_prompts, encode_prompts
from saft_clip.text_tower import Packing, encode_packed, ends_of_text, padding_reason
from saft_kernels import attach, reference, select
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["tench", "great white shark", "hen", "Spotted salamander with a long name", "ox"]


def small_config(name: str = "ViT-B-32", **text: Any) -> dict[str, Any]:
    """An open_clip model's settings with two small layers."""
    torch.manual_seed(0)
    config = copy.deepcopy(open_clip.get_model_config(name))
    config["vision_cfg"].update({"layers": 1, "width": 64, "image_size": 32, "patch_size": 16})
    config["text_cfg"].update({"layers": 2, "width": 64, "heads": 4, **text})
    return config


def small_clip(name: str = "ViT-B-32", **text: Any) -> nn.Module:
    return open_clip.CLIP(**small_config(name, **text)).double()


def custom_text(**text: Any) -> nn.Module:
    return open_clip.CustomTextCLIP(**small_config(**text)).double()


def prompts(*templates: str) -> Tensor:
    return class_prompts(NAMES, templates, open_clip.get_tokenizer("ViT-B-32")).flatten(0, 1)


MODELS = {
    "CLIP": lambda: small_clip(),
    "CustomTextCLIP": lambda: custom_text(proj_bias=True),
    "layer scale, QuickGELU": lambda: small_clip("ViT-B-32-quickgelu", ls_init_value=0.1),
    "eos": lambda: small_clip(pool_type="eos", eos_id=49407),
}


def packed(model: nn.Module, tokens: Tensor) -> Tensor:
    return encode_packed(model, Packing.of(tokens, ends_of_text(model, tokens)))


@pytest.mark.parametrize("templates", [("a photo of a {}.",), ("{}",), ("a {}.", "the {}, seen.")])
@pytest.mark.parametrize("name", MODELS)
def test_features_and_all_gradients_are_those_of_the_padded_prompts(name, templates):
    model, tokens = MODELS[name](), prompts(*templates)
    assert padding_reason(model) is None
    outputs, gradients = [], []
    for encode in (lambda: model.encode_text(tokens), lambda: packed(model, tokens)):
        out = encode()
        (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        outputs.append(out.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert_close(outputs[1], outputs[0], "double_model")
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert_close(gradients[1][key], gradient, "double_model")


@pytest.mark.parametrize("count", [1, 2])
def test_one_prompt_and_equal_prompts(count):
    model, tokens = small_clip(), prompts("a photo of a {}.")[:1].repeat(count, 1)
    assert_close(packed(model, tokens).detach(), model.encode_text(tokens).detach(), "double_model")


def test_no_padding_is_packed_and_the_prefix_once():
    tokens = prompts("a photo of a {}.")
    ends = tokens.argmax(-1)
    packing = Packing.of(tokens, ends)
    assert packing.prefix == 5  # start, a, photo, of, a
    assert packing.tokens.numel() == 5 + int((ends + 1 - 5).sum())
    assert sum(count for count, _ in packing.groups) == len(tokens)
    assert torch.equal(packing.tokens[packing.ends], tokens[torch.arange(len(tokens)), ends])
    assert torch.equal(packing.positions[packing.ends], ends)


def test_checkpointing_gives_the_same_gradients():
    model, tokens = small_clip(), prompts("a photo of a {}.")
    grads = []
    for enable in (False, True):
        model.transformer.grad_checkpointing = enable
        packed(model, tokens).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert all(map(torch.equal, *grads))


def test_under_autocast_features_are_close_to_the_padded_ones():
    model, tokens = small_clip().float(), prompts("a photo of a {}.")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        features, padded = packed(model, tokens), model.encode_text(tokens)
    assert features.dtype == padded.dtype
    assert torch.nn.functional.cosine_similarity(features.float(), padded.float()).min() > 0.999


def test_sampled_gradients_of_packed_prompts():
    model, tokens = small_clip(), prompts("a photo of a {}.")
    mask = select(model, density=0.02, score="random", include=["transformer.*", "token*", "text*"])
    packed(model, tokens).square().sum().backward()
    dense = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    with attach(model, mask) as sparse:
        packed(model, tokens).square().sum().backward()
        for name, values in sparse.named_parameters():
            wanted = reference.gather(dense[name], mask[name])
            assert_close(values.grad, wanted, "double_model")


def test_encode_prompts_packs_and_normalises():
    model, tokens = small_clip(), prompts("a photo of a {}.")
    expected = torch.nn.functional.normalize(model.encode_text(tokens).float(), dim=-1)
    assert torch.allclose(encode_prompts(model, tokens), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"no_causal_mask": True}, "bidirectional"),
        ({"embed_cls": True}, "class token"),
        ({"pool_type": "last"}, "reads out at 'last'"),
        ({"qk_norm": True}, "unusual"),
    ],
)
def test_other_towers_keep_their_padding_and_say_why(change, reason):
    model, tokens = custom_text(**change), prompts("a photo of a {}.")
    assert reason in padding_reason(model)
    expected = torch.nn.functional.normalize(model.encode_text(tokens).float(), dim=-1)
    assert torch.allclose(encode_prompts(model, tokens), expected, atol=1e-6)


def test_a_tower_with_hooks_keeps_its_padding():
    model = small_clip()
    handle = model.transformer.resblocks[0].register_forward_hook(lambda *_: None)
    assert "hooks" in padding_reason(model)
    handle.remove()
    assert padding_reason(model) is None

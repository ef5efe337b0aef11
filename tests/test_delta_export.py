"""Deltas as vLLM and PEFT read them, fine-tuned models as open_clip and transformers load them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from clip_helpers import SMALL, SMALL_RESNET
from saft_clip.errors import ModelError
from saft_clip.export import save_open_clip, save_transformers
from saft_clip.models import ClipModel, load_model
from saft_kernels import SparseDelta, ops
from saft_kernels.delta import extract, save_patches, save_shira, weight_patches
from saft_kernels.errors import DeltaError, FileWriteError
from small_deltas import DTYPES, tuned_pair

pytestmark = pytest.mark.usefixtures("one_thread")


# vLLM ---------------------------------------------------------------------------------------------


def patched(base: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """As vLLM loads a patch: a tensor of NaN with the new values in it, copied where it is none."""
    flat = torch.full((base.numel(),), float("nan"), dtype=base.dtype)
    flat.index_copy_(0, indices.long(), values)
    loaded = flat.view(base.shape)
    return torch.where(loaded.isnan(), base, loaded)


def finite_pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module, SparseDelta]:
    base, tuned, _ = tuned_pair(dtype)
    with torch.no_grad():
        for param in tuned.parameters():
            param.nan_to_num_(nan=0.5)
    return base, tuned, extract(tuned, base).delta


@pytest.mark.parametrize("dtype", DTYPES)
def test_patches_make_the_tuned_checkpoint(dtype: torch.dtype) -> None:
    base, tuned, delta = finite_pair(dtype)
    before, after = base.state_dict(), tuned.state_dict()
    patches = list(weight_patches(delta))
    assert sum(patch.indices.numel() for patch in patches) == delta.nnz
    for patch in patches:
        assert patch.indices.dtype == torch.int32
        assert (patch.shape, patch.dtype) == (
            tuple(before[patch.name].shape),
            before[patch.name].dtype,
        )
        assert bool((patch.indices.diff() > 0).all())
        assert torch.equal(
            patched(before[patch.name], patch.values, patch.indices), after[patch.name]
        )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed - {"decoder.weight"} == {patch.name for patch in patches}  # which is tied


def test_patch_file_holds_the_same(tmp_path: Path) -> None:
    _, _, delta = finite_pair(torch.bfloat16)
    save_patches(delta, tmp_path / "patch.safetensors", {"conv.weight": "model.conv.weight"})
    wanted = {patch.name: patch for patch in weight_patches(delta)}
    wanted["model.conv.weight"] = wanted.pop("conv.weight")
    with safe_open(tmp_path / "patch.safetensors", "pt") as file:
        texts = file.metadata()
        assert (texts["format"], texts["version"]) == ("saft-weight-patch", "1")
        table = json.loads(texts["patches"])
        assert {name for name, _, _ in table} == wanted.keys()
        assert len(list(file.keys())) == 2 * len(table)
        for name, dtype, shape in table:
            patch = wanted[name]
            assert (dtype, tuple(shape)) == (str(patch.dtype)[6:], patch.shape)
            assert torch.equal(file.get_tensor(f"{name}.indices"), patch.indices)
            assert torch.equal(file.get_tensor(f"{name}.values"), patch.values)


def test_nan_cannot_be_patched(tmp_path: Path) -> None:
    _, _, delta = tuned_pair()
    with pytest.raises(DeltaError, match="writes NaN to 'scale'"):
        list(weight_patches(delta))
    with pytest.raises(DeltaError, match="writes NaN"):
        save_patches(delta, tmp_path / "patch.safetensors")
    assert not any(tmp_path.iterdir())


# PEFT ---------------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 6, bias=False)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x).relu()))


def layers_delta(counts: dict[str, int]) -> tuple[nn.Module, nn.Module, SparseDelta]:
    torch.manual_seed(0)
    base = Layers()
    tuned = copy.deepcopy(base)
    for name, count in counts.items():
        param = tuned.get_parameter(name)
        flat = torch.randperm(param.numel())[:count].sort().values
        with torch.no_grad():
            ops.scatter_(param, flat, torch.randn(count))
    return base, tuned, extract(tuned, base).delta


@pytest.mark.parametrize(
    ("counts", "rank"),
    [
        ({"first.weight": 5, "second.weight": 30}, 2),
        ({"first.weight": 32}, 1),
        ({"second.weight": 1}, 1),
    ],
)
def test_peft_loads_a_shira_adapter(counts: dict[str, int], rank: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, tuned, delta = layers_delta(counts)
    assert save_shira(delta, base, tmp_path / "adapter") == 0
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    (config,) = adapted.peft_config.values()
    assert (config.r, sorted(config.target_modules)) == (rank, sorted(n[:-7] for n in counts))
    x = torch.randn(9, 12)
    torch.testing.assert_close(adapted(x), tuned(x), rtol=1e-5, atol=1e-6)
    merged = adapted.merge_and_unload()
    for name, param in merged.named_parameters():
        torch.testing.assert_close(param, tuned.get_parameter(name), rtol=1e-6, atol=1e-7)
        untouched = base.get_parameter(name) == tuned.get_parameter(name)
        assert torch.equal(param[untouched], base.get_parameter(name)[untouched])


def test_what_an_adapter_cannot_hold_is_said_or_left_out(tmp_path: Path) -> None:
    base, _, delta = layers_delta({"first.weight": 4, "first.bias": 3, "norm.weight": 2})
    with pytest.raises(
        DeltaError, match=r"5 of the delta's 9 entries are elsewhere \('first.bias'"
    ):
        save_shira(delta, base, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert save_shira(delta, base, tmp_path / "adapter", partial=True) == 5


def test_adapters_that_would_be_empty_or_too_full(tmp_path: Path) -> None:
    base, _, delta = layers_delta({"first.bias": 3})
    with pytest.raises(DeltaError, match="changes no weight of a linear layer"):
        save_shira(delta, base, tmp_path / "adapter", partial=True)
    base, _, delta = layers_delta({"first.weight": 240, "second.weight": 1})
    with pytest.raises(DeltaError, match=r"of rank 8 does not fit into 'first\.weight'"):
        save_shira(delta, base, tmp_path / "adapter")


def test_attention_of_torch_is_no_linear_layer(tmp_path: Path) -> None:
    """It reads its output projection past the layer, where no adapter is."""
    base = nn.MultiheadAttention(8, 2)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.out_proj.weight[0, 0] = 3
    with pytest.raises(DeltaError, match="no weight of a linear layer"):
        save_shira(extract(tuned, base).delta, base, tmp_path / "adapter")


def test_an_adapter_needs_the_original_values(tmp_path: Path) -> None:
    base, _, delta = layers_delta({"first.weight": 4})
    delta.save(tmp_path / "delta.safetensors")
    loaded = SparseDelta.load(tmp_path / "delta.safetensors")
    with pytest.raises(DeltaError, match="original values are not known"):
        save_shira(loaded, base, tmp_path / "adapter")
    loaded.learn_originals(base)
    save_shira(loaded, base, tmp_path / "adapter")
    save_shira(delta, base, tmp_path / "other")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (
            tmp_path / "other" / name
        ).read_bytes()


# open_clip and transformers -----------------------------------------------------------------------


def fine_tuned(name: str, **options: bool) -> ClipModel:
    torch.manual_seed(0)
    clip = load_model(name, "random", **options)
    with torch.no_grad():
        for param in clip.model.parameters():  # biases are zero in a random model
            param.add_(0.02 * torch.randn_like(param))
    return clip


@pytest.mark.parametrize("name", [SMALL, SMALL_RESNET])
def test_open_clip_loads_the_file(name: str, tmp_path: Path) -> None:
    clip = fine_tuned(name)
    save_open_clip(clip.model, tmp_path / "tuned.safetensors")
    loaded = open_clip.create_model(name, pretrained=str(tmp_path / "tuned.safetensors"))
    for (key, mine), theirs in zip(
        clip.model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), key


@pytest.mark.parametrize("quick", [False, True])
def test_transformers_model_is_the_same(quick: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    clip = fine_tuned(SMALL, force_quick_gelu=quick)
    save_transformers(clip, tmp_path / "hf")
    loaded, about = transformers.CLIPModel.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(about.values()), about
    size = clip.model.visual.image_size[0]
    images = torch.randn(3, 3, size, size)
    tokens = clip.tokenizer(["a cat", "a photo of a dog on the moon", "x"])
    with torch.no_grad():
        mine = clip.model(images, tokens)
        theirs = loaded.eval()(input_ids=tokens, pixel_values=images)
    torch.testing.assert_close(theirs.image_embeds, mine[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.text_embeds, mine[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        theirs.logits_per_image, mine[2] * mine[0] @ mine[1].T, rtol=1e-4, atol=1e-4
    )
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor.image_mean == pytest.approx(list(clip.model.visual.image_mean))
    assert dict(processor.crop_size) == {"height": size, "width": size}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (SMALL_RESNET, "its image tower is no ViT"),
        ("saft-tiny", "its towers pool otherwise"),
    ],
)
def test_other_architectures_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    clip = load_model(name, None if name == "saft-tiny" else "random")
    with pytest.raises(ModelError, match=reason):
        save_transformers(clip, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    clip = load_model(SMALL, "random")
    with pytest.raises(FileWriteError):
        save_transformers(clip, tmp_path / "file" / "hf")
    base, _, delta = layers_delta({"first.weight": 4})
    with pytest.raises(FileWriteError):
        save_shira(delta, base, tmp_path / "file" / "adapter")

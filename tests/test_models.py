"""Loading models: names, tags, checkpoint files, and what is wrong with them."""

import copy
import pickle
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from clip_helpers import SMALL, SMALL_RESNET, cut_short, small_checkpoint
from saft_clip.errors import CheckpointError, ModelError
from saft_clip.models import autocast, load_model, train_mode
from saft_clip.tiny import TINY_NAME


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("weights") / "small.safetensors", seed=5)


@pytest.fixture
def tagged(checkpoint, monkeypatch):
    """Give the small model a tag that "downloads" the checkpoint; returns what is known of it."""
    facts = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli") | {"hf_hub": "nobody/nothing/"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, SMALL, {"stand_in": facts})
    for module in (open_clip, open_clip.factory):
        monkeypatch.setattr(module, "download_pretrained", lambda *_, **__: str(checkpoint))
    return facts


def assert_weights(model, state):
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_checkpoint_file(checkpoint):
    clip = load_model(SMALL, str(checkpoint))
    assert_weights(clip.model, load_file(checkpoint))
    assert not clip.model.training
    assert (clip.name, clip.pretrained) == (SMALL, str(checkpoint))
    assert clip.tokenizer(["a", "b"]).shape == (2, 16)


@pytest.mark.parametrize("layout", ["plain", "open_clip training"])
def test_pt_file_of_tensors(checkpoint, tmp_path, layout):
    state = load_file(checkpoint)
    content = state
    if layout != "plain":
        content = {"epoch": 3, "state_dict": {f"module.{name}": v for name, v in state.items()}}
    torch.save(content, tmp_path / "small.pt")
    assert_weights(load_model(SMALL, str(tmp_path / "small.pt")).model, state)


def test_half_precision_file_becomes_float32(checkpoint, tmp_path):
    state = {name: value.half() for name, value in load_file(checkpoint).items()}
    torch.save(state, tmp_path / "half.pt")
    clip = load_model(SMALL, str(tmp_path / "half.pt"))
    assert_weights(clip.model, {name: value.float() for name, value in state.items()})


def test_tag_equals_open_clips_own_loading(tagged):
    clip = load_model(SMALL, "stand-in")
    model, train, val = open_clip.create_model_and_transforms(SMALL, pretrained="stand-in")
    assert_weights(clip.model, model.state_dict())
    assert repr(clip.preprocess_val) == repr(val)
    assert repr(clip.preprocess_train) == repr(train)
    assert clip.model.visual.preprocess_cfg == model.visual.preprocess_cfg


@pytest.mark.parametrize("quick", [False, True])
def test_tag_brings_quick_gelu(tagged, quick):
    tagged["quick_gelu"] = quick
    clip = load_model(SMALL, "stand-in")
    kinds = {type(m).__name__ for m in clip.model.modules() if "GELU" in type(m).__name__}
    assert kinds == {"QuickGELU" if quick else "GELU"}


def test_force_quick_gelu(checkpoint):
    clip = load_model(SMALL, str(checkpoint), force_quick_gelu=True)
    assert any(type(module).__name__ == "QuickGELU" for module in clip.model.modules())


def test_tag_wins_over_a_file_of_its_name(tagged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stand_in").write_text("not weights")
    load_model(SMALL, "stand_in")


def test_random_weights_only_by_name():
    load_model(SMALL, "random")
    with pytest.raises(ModelError, match="no weights were named for small-clip"):
        load_model(SMALL)
    with pytest.raises(ModelError, match=r"its tags are openai, laion400m_e31.*or random"):
        load_model("ViT-B-16")


def test_tiny_model_has_its_own_weights():
    clip = load_model(TINY_NAME)
    assert clip.pretrained == "builtin"
    assert_weights(load_model(TINY_NAME, "builtin").model, clip.model.state_dict())


@pytest.mark.parametrize(
    ("name", "near"),
    [("ViT-B16", "ViT-B-16"), ("vit-b-32", "ViT-B-32"), ("saft_tiny", "saft-tiny")],
)
def test_unknown_name_with_near_matches(name, near):
    with pytest.raises(ModelError, match=rf"no model '{name}' in open_clip; did you mean .*{near}"):
        load_model(name, "openai")


def test_unknown_name_without_near_matches():
    with pytest.raises(ModelError, match="list_models"):
        load_model("qqqqqq", "openai")


def test_unknown_tag_lists_the_tags():
    with pytest.raises(ModelError, match=r"no pretrained tag 'opnai'.* its tags are openai, laion"):
        load_model("ViT-B-16", "opnai")
    with pytest.raises(ModelError, match="it has no tags"):
        load_model(SMALL, "no/such/file.pt")


def test_failed_download(tagged, monkeypatch):
    def offline(*_, **__):
        raise FileNotFoundError("Failed to download file (x). Last error: no network.\nMore.")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(ModelError) as caught:
        load_model(SMALL, "stand-in")
    assert str(caught.value) == (
        "the weights 'stand-in' of small-clip could not be downloaded from nobody/nothing/ "
        "(Failed to download file (x)); check the network, or give --pretrained a local file"
    )


def test_checkpoint_of_another_architecture(checkpoint, tmp_path):
    resnet = small_checkpoint(tmp_path / "resnet.safetensors", SMALL_RESNET)
    for name, file in ((SMALL, resnet), (SMALL_RESNET, checkpoint)):
        with pytest.raises(ModelError, match=rf"does not fit {name} \(.*\"visual\.\w+.*--model"):
            load_model(name, str(file))


def test_checkpoint_of_another_width(checkpoint, tmp_path):
    state = load_file(checkpoint)
    torch.save(state | {"visual.proj": torch.zeros(16, 8)}, tmp_path / "narrow.pt")
    with pytest.raises(ModelError, match=r"size mismatch for visual.proj: .*\[16, 8\]"):
        load_model(SMALL, str(tmp_path / "narrow.pt"))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_checkpoint_cut_short(checkpoint, tmp_path, suffix, share):
    file = tmp_path / f"cut.{suffix}"
    if suffix == "pt":
        torch.save(load_file(checkpoint), file)
    else:
        file.write_bytes(checkpoint.read_bytes())
    cut_short(file, share)
    with pytest.raises(CheckpointError, match=r"cut.* cannot be read: it is broken, cut short"):
        load_model(SMALL, str(file))


class Hostile:
    """What an unsafe unpickler would execute."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_hostile_pickle_is_not_executed(tmp_path):
    target = tmp_path / "executed"
    torch.save({"visual.proj": Hostile(target)}, tmp_path / "hostile.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(target)))
    for name in ("hostile.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="holds more than tensors"):
            load_model(SMALL, str(tmp_path / name))
    assert not target.exists()


def test_a_pickle_is_read_as_tensors_only_whatever_torch_takes_exception_to(tmp_path, monkeypatch):
    """open_clip reads a file once more, its way, if torch raises a TypeError."""
    asked = []

    def load(file, **options):
        asked.append(options.get("weights_only"))
        raise TypeError("made to fail")

    monkeypatch.setattr(torch, "load", load)
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="made to fail"):
        load_model(SMALL, str(tmp_path / "a.pt"))
    assert asked == [True]


def test_one_number_that_stands_for_many_is_refused(tmp_path):
    """A file of 1 kB, of which open_clip would make an embedding of a million positions."""
    torch.save(
        {"visual.positional_embedding": torch.ones(1).expand(1 << 20, 16)}, tmp_path / "a.pt"
    )
    with pytest.raises(CheckpointError, match="claims more numbers than the file holds"):
        load_model(SMALL, str(tmp_path / "a.pt"))


@pytest.mark.parametrize("suffix", ["pt", "npz"])
def test_parts_that_unpack_to_any_size_are_refused(tmp_path, suffix):
    file = tmp_path / f"bomb.{suffix}"
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    with ZipFile(tmp_path / "plain.pt") as plain, ZipFile(file, "w", ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert file.stat().st_size < 20_000
    with pytest.raises(CheckpointError, match="a part of it is compressed"):
        load_model(SMALL, str(file))


def test_parts_that_overlap_are_refused(tmp_path):
    file = tmp_path / "a.zip"
    with ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", bytes(100_000))
        for i in range(9):
            entry = copy.copy(archive.getinfo("a/data.pkl"))
            entry.filename = f"a/{i}"
            archive.filelist.append(entry)
    with pytest.raises(CheckpointError, match="its parts overlap"):
        load_model(SMALL, str(file))


def test_what_a_file_says_of_itself_cannot_steer_a_terminal(tmp_path):
    torch.save({"\x1b[2J" + "x" * 5000: torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="does not fit") as caught:
        load_model(SMALL, str(tmp_path / "a.pt"))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 3}, torch.ones(2)])
def test_file_that_holds_no_weights(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises((CheckpointError, ModelError), match=r"odd\.pt"):
        load_model(SMALL, str(tmp_path / "odd.pt"))


def test_model_that_needs_a_missing_package(monkeypatch):
    monkeypatch.setattr(open_clip.hf_model, "transformers", None)
    with pytest.raises(ModelError, match=r"cannot build roberta-ViT-B-32 here .*transformers"):
        load_model("roberta-ViT-B-32", "random")


def test_precision():
    with pytest.raises(ModelError, match="precision 'fp16' is not one of fp32, amp_bf16"):
        load_model(SMALL, "random", precision="fp16")
    clip = load_model(SMALL, "random", precision="amp_bf16")
    assert {p.dtype for p in clip.model.parameters()} == {torch.float32}
    tokens = clip.tokenizer(["x"])
    with torch.no_grad(), autocast("amp_bf16", "cpu"):
        assert clip.model.encode_text(tokens).dtype == torch.bfloat16
    with torch.no_grad(), autocast("fp32", "cpu"):
        assert clip.model.encode_text(tokens).dtype == torch.float32


@pytest.mark.parametrize("device", ["cuda:77", "gpu", "meta2"])
def test_device_that_is_not_there(device):
    with pytest.raises(ModelError, match=f"device '{device}' cannot be used here .*--device cpu"):
        load_model(SMALL, "random", device=device)


def test_batch_norm_statistics_do_not_move_in_train_mode():
    model = load_model(SMALL_RESNET, "random").model
    train_mode(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.encode_image(torch.randn(4, 3, 32, 32)).sum().backward()
    assert model.training
    assert model.visual.conv1.weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())

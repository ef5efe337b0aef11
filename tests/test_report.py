"""The report page: built from the files of a run, self-contained, and right about the numbers."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import open_clip
import pytest
import torch

from clip_helpers import SMALL, SMALL_RESNET, cut_short, small_checkpoint, write_folder
from html_page import Page
from saft_clip.cli import main
from saft_clip.config import FinetuneConfig
from saft_clip.errors import CheckpointError
from saft_clip.metrics import MetricsLog, read_metrics
from saft_clip.report import accuracy_rows, file_size, write_report
from saft_clip.results import KINDS, count_blocks, locate
from saft_clip.run_folder import RunFolder
from saft_clip.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    data = root / "pets"
    for split in ("train", "val", "test"):
        write_folder(data / split, {"cat": 3, "dog <b>": 3})
    other = write_folder(root / "other" / "pets", {"cat": 2, "dog <b>": 2})
    config = FinetuneConfig(
        train_data=str(data),
        eval_data=(str(other), str(data)),
        model=SMALL,
        pretrained=str(small_checkpoint(root / "small.safetensors")),
        force_quick_gelu=True,
        template=("a drawing of a {}.", "the {}"),
        shots=3,
        epochs=2,
        density=0.01,
        lr=1e-3,
        output=str(root / "out"),
    )
    return finetune(config)


@pytest.fixture
def folder(run, tmp_path):
    return shutil.copytree(run.output, tmp_path / "a copy")


def change_results(folder, change):
    """Let ``change`` edit the results of a run."""
    results = json.loads((folder / "results.json").read_text())
    change(results)
    (folder / "results.json").write_text(json.dumps(results))


def change_config(folder, **values):
    FinetuneConfig.load(folder / "config.yaml").changed(**values).save(folder / "config.yaml")


def usage(folder):
    """The words of the command with which the page says how to use the result."""
    page = Page(write_report(folder).read_text())
    return shlex.split(re.search(r"saft evaluate.*?(?= Settings and)", page.text)[0])


def test_page_is_whole_and_loads_nothing(run):
    text = (run.output / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(link.startswith("#") for link in page.loaded)
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg") == 3


def test_page_says_what_was_found(run):
    page = Page((run.output / "report.html").read_text())
    after = {e["spec"]: e for e in run.results["evaluations"] if e["when"] == "after"}
    for found in after.values():
        assert f"{100 * found['top1']:.1f}%" in page.text
    assert f"{run.results['trained']:,}" in page.text
    assert f"{run.results['parameters']:,}" in page.text
    assert file_size(run.artefact.stat().st_size) in page.text


def test_figures_take_the_pages_colours(run):
    """No placeholder colour may be left, and no fixed colour but the shapes' defaults."""
    text = (run.output / "report.html").read_text()
    svg = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert re.findall(r"#[0-9a-f]{2}fe[0-9a-f]{2}", svg) == []
    assert re.findall(r"(?:fill|stroke): #(?!000000)[0-9a-f]{6}", svg) == []
    assert "DejaVu" not in svg


def test_it_is_built_from_the_folder_alone(run, folder):
    written = (folder / "report.html").read_text()
    written = written.replace(f"{run.output}/delta", f"&#39;{folder}/delta")
    written = written.replace("delta.safetensors --", "delta.safetensors&#39; --")
    (folder / "report.html").unlink()
    (folder / "delta.safetensors").unlink()
    assert write_report(folder) == folder / "report.html"
    assert (folder / "report.html").read_text() == written


def test_data_sets_of_one_name_are_told_apart(run):
    rows = accuracy_rows(run.results["evaluations"])
    assert [row["shifted"] for row in rows] == [False, True]
    assert rows[0]["name"].endswith("/pets")
    assert rows[1]["name"].endswith("other/pets")


def test_run_without_evaluation_has_a_report(folder):
    change_results(folder, lambda results: results.update(evaluations=[]))
    page = Page(write_report(folder).read_text())
    assert "Accuracy before" not in page.text


def test_page_says_which_images_were_trained_on(folder):
    def mark(results):
        for line in results["evaluations"]:
            line["includes_training"] = not line["shifted"]

    note = "its images include the training images"
    assert note not in Page(write_report(folder).read_text()).text
    change_results(folder, mark)
    text = write_report(folder).read_text()
    rows = re.findall(r"<tr>.*?</tr>", text, flags=re.DOTALL)
    assert ["in distribution" in row for row in rows if note in row] == [True]
    assert Page(text).text.count("; training images included") == 1


def test_the_command_on_the_page_gives_the_accuracy_on_the_page(run, folder, tmp_path):
    """Templates, precision and QuickGELU were missing once, and nothing was quoted."""
    program, *arguments = usage(folder)
    assert program == "saft"
    assert arguments[arguments.index("--delta") + 1] == str(folder / "delta.safetensors")
    assert main([*arguments, "--json", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())["results"]
    after = [line for line in run.results["evaluations"] if line["when"] == "after"]
    assert [line["data"] for line in again] == [line["spec"] for line in after]
    for found, line in zip(again, after, strict=True):
        assert {key: line[key] for key in found if key != "data"} == {
            key: value for key, value in found.items() if key != "data"
        }


def test_command_of_a_run_with_defaults_is_short(folder):
    values = {"force_quick_gelu": False, "template": (), "precision": "fp32"}
    change_config(folder, **values, eval_data=("builtin:mnist",))
    change_results(folder, lambda results: results.update(model="saft-tiny", pretrained="builtin"))
    delta = str(folder / "delta.safetensors")
    expected = ["--model", "saft-tiny", "--delta", delta, "--data", "builtin:mnist"]
    assert usage(folder) == ["saft", "evaluate", *expected]


def test_command_of_full_fine_tuning_keeps_what_the_tag_brought(folder):
    change_config(folder, force_quick_gelu=False, template=(), device="cuda", eval_data=("x y",))
    outcome = {"model": "ViT-B-16", "pretrained": "openai", "artefact": "model.safetensors"}
    change_results(folder, lambda results: results.update(outcome))
    model = ["--model", "ViT-B-16", "--force-quick-gelu"]
    weights = ["--pretrained", str(folder / "model.safetensors")]
    where = ["--precision", "amp_bf16", "--device", "cuda", "--data", "x y"]
    assert usage(folder) == ["saft", "evaluate", *model, *weights, *where]


def test_page_of_a_given_mask(run, folder):
    change_config(folder, mask="ours.safetensors", density=0.5)
    page = Page(write_report(folder).read_text())
    share = run.results["trained"] / run.results["parameters"]
    assert (
        f"The {run.results['trained']:,} entries of the given mask ours.safetensors." in page.text
    )
    assert f"density {share:.3g} (of the given mask)" in page.text
    assert "largest mean gradient" not in page.text


def test_names_that_are_not_utf8(folder):
    def rename(results):
        for line in results["evaluations"]:
            line["dataset"] = line["spec"] = line["spec"] + "\udcff"

    change_results(folder, rename)
    page = Page(write_report(folder).read_text())
    assert r"/other/pets\udcff" in page.text


def test_record_of_names_that_are_not_utf8(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("evaluation", 3, dataset="Tiere ä", skipped=["a/\udcff\udcfe.png: broken \\udcff"])
    log.close()
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert line["dataset"] == "Tiere ä"
    assert line["skipped"] == ["a/\udcff\udcfe.png: broken \\udcff"]


def test_unfinished_run(folder):
    (folder / "results.json").unlink()
    with pytest.raises(CheckpointError, match="holds no finished run"):
        write_report(folder)


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl"])
def test_broken_files(folder, name):
    page = (folder / "report.html").read_bytes()
    cut_short(folder / name, 0.3)
    path = folder / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(CheckpointError, match=f"{name} is broken"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == page


def test_results_of_another_kind(folder):
    (folder / "results.json").write_text('{"evaluations": []}')
    with pytest.raises(CheckpointError, match="is not what this release writes"):
        write_report(folder)


BAD_RESULTS = {
    "a list": lambda results: [results],
    "no model": lambda results: results.pop("model"),
    "a count is a text": lambda results: results.update(trained="x"),
    "a count is negative": lambda results: results.update(artefact_bytes=-1),
    "no parameters at all": lambda results: results.update(parameters=0),
    "a number without end": lambda results: results["seconds"].update(training=float("inf")),
    "no number": lambda results: results["evaluations"][0].update(top1=float("nan")),
    "more than all": lambda results: results["evaluations"][0].update(top1=1e9),
    "another moment": lambda results: results["evaluations"][0].update(when="\x1b[2J"),
    "only before": lambda results: results["evaluations"].pop(),
    "a long text": lambda results: results.update(model="x" * 20_000),
    "a path": lambda results: results.update(artefact="../../x"),
    "another kind": lambda results: results["blocks"][0].update(kind="odd"),
    "blocks are a dict": lambda results: results.update(blocks={}),
    "many blocks": lambda results: results.update(blocks=results["blocks"] * 10_000),
    "environment is a list": lambda results: results.update(environment=[1]),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_results_that_no_release_writes(folder, case):
    page = (folder / "report.html").read_bytes()
    change_results(folder, BAD_RESULTS[case])
    if case == "a list":
        (folder / "results.json").write_text("[]")
    with pytest.raises(CheckpointError, match=rf"{folder / 'results.json'} is") as caught:
        write_report(folder)
    assert str(caught.value).isprintable()
    assert (folder / "report.html").read_bytes() == page
    with pytest.raises(CheckpointError, match=r"results\.json is"):
        finetune(
            FinetuneConfig.load(folder / "config.yaml").changed(output=str(folder), resume=True)
        )


@pytest.mark.parametrize(
    "line",
    [
        *("3", "{}", '{"kind": "odd", "step": 1}', '{"kind": "train", "step": -1}'),
        *('{"kind": "train", "step": 1, "loss": "x"}', '{"kind": "train", "step": 1, "loss": NaN}'),
        *('{"kind": "validation", "step": 1, "top1": 2}', '{"kind": "train", "step": 1}'),
        *("[" * 100_000, '{"kind": ["train"], "step": 1}'),
    ],
)
def test_lines_that_no_release_writes(folder, line):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is"):
        write_report(folder)


@pytest.mark.parametrize(
    "content", ["[]", '{"the training data": 3}', '{"x": {"y": []}}', "[" * 9999]
)
def test_inputs_that_no_release_writes(folder, content):
    (folder / "inputs.json").write_text(content)
    config = FinetuneConfig.load(folder / "config.yaml").changed(resume=True)
    with pytest.raises(CheckpointError, match=rf"{folder / 'inputs.json'} is"):
        RunFolder(folder).start(config, {})


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("positional_embedding", ("text", "in", "embedding")),
        ("token_embedding.weight", ("text", "in", "embedding")),
        ("text_projection", ("text", "out", "other")),
        ("ln_final.weight", ("text", "out", "norm")),
        ("transformer.resblocks.0.attn.in_proj_weight", ("text", "1", "attention")),
        ("text.transformer.resblocks.11.mlp.c_fc.bias", ("text", "12", "mlp")),
        ("visual.transformer.resblocks.3.ln_1.weight", ("image", "4", "norm")),
        ("visual.class_embedding", ("image", "in", "embedding")),
        ("visual.conv1.weight", ("image", "in", "embedding")),
        ("visual.ln_pre.bias", ("image", "in", "norm")),
        ("visual.ln_post.bias", ("image", "out", "norm")),
        ("visual.proj", ("image", "out", "other")),
        ("visual.layer2.0.conv1.weight", ("image", "2", "other")),
        ("visual.layer4.1.bn2.weight", ("image", "4", "norm")),
        ("visual.attnpool.q_proj.weight", ("image", "out", "attention")),
        ("visual.trunk.blocks.5.attn.qkv.weight", ("image", "6", "attention")),
        ("visual.trunk.blocks.5.norm1.weight", ("image", "6", "norm")),
        ("visual.trunk.patch_embed.proj.weight", ("image", "in", "embedding")),
    ],
)
def test_where_a_parameter_is(name, place):
    assert locate(name) == place


@pytest.mark.parametrize("name", [SMALL, SMALL_RESNET, "ViT-B-16"])
def test_blocks_add_up(name):
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta", pretrained_image=False)
    every = {n: p.numel() for n, p in model.named_parameters()}
    blocks = count_blocks(model, every)
    assert {block["kind"] for block in blocks} <= set(KINDS)
    encoders = sum(p.numel() for n, p in model.named_parameters() if n != "logit_scale")
    assert sum(block["parameters"] for block in blocks) == encoders
    assert [block["trained"] for block in blocks] == [block["parameters"] for block in blocks]
    numbered = [b["block"] for b in blocks if b["encoder"] == "image"]
    assert numbered[0] == "in"
    assert numbered[-1] == "out"


def test_blocks_of_a_mask():
    model = open_clip.create_model(SMALL)
    numbers = {"visual.proj": 5, "transformer.resblocks.0.mlp.c_fc.weight": 7, "adapter.x": 3}
    trained = [
        (b["encoder"], b["block"], b["kind"], b["trained"])
        for b in count_blocks(model, numbers)
        if b["trained"]
    ]
    assert trained == [("image", "out", "other", 5), ("text", "1", "mlp", 7)]


def test_file_sizes():
    assert [file_size(n) for n in (0, 999, 1200, 1_234_567, 5e9)] == [
        *("0 B", "999 B", "1.2 kB", "1.23 MB", "5 GB")
    ]

"""Experiments: plans, protocols, cells, statistics, tables and pages, without running anything."""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from html_page import Page
from saft_clip.config import FinetuneConfig
from saft_clip.data import ImageDataset
from saft_clip.errors import CheckpointError, ConfigError
from saft_clip.experiment import formats, page, pictures, retrieval
from saft_clip.experiment.bound import description_bits, gaps, occam_bound
from saft_clip.experiment.cells import Cell, final_cells, tasks, trial_cells
from saft_clip.experiment.command import make_plan
from saft_clip.experiment.paper import PAPER
from saft_clip.experiment.plan import Plan
from saft_clip.experiment.protocols import PROTOCOLS, find_protocol
from saft_clip.experiment.record import Record, Row, Run
from saft_clip.experiment.statistics import estimate, harmonic_mean, holm, p_value
from saft_clip.experiment.tables import accuracy_tables, cost_table
from saft_clip.methods import METHODS

BASE = {
    "protocol": "shift",
    "models": ["saft-tiny"],
    "methods": ["zero-shot", "full", "saft"],
    "train": ["builtin:mnist"],
    "evaluate": ["builtin:uci", "builtin:fonts"],
}

# Plans --------------------------------------------------------------------------------------------


def plan(**values):
    return Plan.from_dict(BASE | values)


SAFT = [{"density": 0.01}, {"density": 0.1, "lr": 1e-3}]
TUNED = {"try": {"full": {"lr": [1e-5, 1e-4]}, "saft": SAFT}}


def test_a_plan_is_what_its_file_says(tmp_path):
    made = plan(
        methods=["zero-shot", {"name": "FT", "method": "full", "lr": "1e-4"}, "saft"],
        shots=[1, 16],
        seeds=[5],
        settings={"epochs": 2, "template": ["a {}."]},
        tuning={"shots": 4, "seed": 9, "try": {"FT": {"lr": [1e-5, 1e-4]}, "saft": SAFT}},
        alphas=[0, 0.5],
        retrieval=["3"],
    )  # fmt: skip
    made.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == made
    assert made.methods[1].settings == {"method": "full", "lr": 1e-4}  # YAML takes 1e-4 for text
    assert made.tuning is not None
    assert made.tuning.tried["FT"] == ({"lr": 1e-5}, {"lr": 1e-4})


def test_a_density_that_each_run_chooses():
    """It passes methods that select nothing by, if the plan sets it for all."""
    made = plan(settings={"density": "auto"})
    assert Plan.from_dict(made.to_dict()) == made
    configs = {c.config.method: c.config for c in final_cells(made, Path("x"), {})}
    assert configs["saft"].density == "auto"
    assert configs["full"].density == 1e-3
    with pytest.raises(ConfigError, match="full with saft-tiny: --method full selects nothing"):
        plan(methods=[{"method": "full", "density": "auto"}])


def test_a_grid_is_every_combination_in_order():
    tried = {
        "full": {"lr": [1.0, 2.0], "wd": [0.1, 0.2]},
        "saft": [{"lr": 1.0}, {"lr": 2.0}, {"lr": 3.0}, {"lr": 4.0}],
    }
    made = plan(tuning={"try": tried}).tuning
    assert made is not None
    assert [tuple(trial.values()) for trial in made.tried["full"]] == [
        (1.0, 0.1), (1.0, 0.2), (2.0, 0.1), (2.0, 0.2),
    ]  # fmt: skip
    assert (made.seed, made.shots) == (0, 16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"protocol": "shifts"}, "no protocol 'shifts'; did you mean 'shift'"),
        ({"method": ["saft"]}, "unknown setting 'method'; did you mean 'methods'"),
        ({"seed": 1}, "unknown setting 'seed'; did you mean 'seeds'"),
        ({"methods": []}, "does not say methods"),
        ({"methods": ["saff"]}, "did you mean 'saft'"),
        ({"methods": ["saft", "saft"]}, "methods has saft twice"),
        ({"methods": [{"name": "x"}]}, "does not say which method it is"),
        ({"methods": [{"method": "saft", "name": " "}]}, "the name of a method must be text"),
        ({"methods": [{"method": "saft", "densty": 1}]}, "'densty'; did you mean 'density'"),
        ({"methods": [{"method": "saft", "shots": 1}]}, "sets shots, which an experiment decides"),
        ({"methods": [{"method": "full", "rank": 1}]}, "full with saft-tiny: --method full has no"),
        ({"methods": [{"name": "x", "method": ["full"]}]}, "does not say which method it is"),
        ({"models": [3]}, "models must be settings"),
        ({"settings": {"method": "lora"}}, "settings cannot set the method"),
        ({"settings": {"pretrained": "x"}}, "pretrained belongs under models"),
        ({"settings": {"rank": 4}}, "rank, which no method of the plan has"),
        ({"shots": [], "tuning": {"try": {"full": {"lr": [1]}}}}, "shots must name at least one"),
        (
            {"tuning": {"try": {"full": {"lr": [1, 1]}, "saft": {"lr": [1, 2]}}}},
            "two trials of full are the same",
        ),
        (
            {"tuning": {"try": {"full": {"density": [0.1]}, "saft": {"lr": [1]}}}},
            "density has no say in full",
        ),
        (
            {"tuning": {"try": {"full": {"lr": [1]}, "saft": {"method": ["lora"]}}}},
            "cannot set the method",
        ),
        ({"evaluate": ["./a/b"], "train": ["a/./b"]}, "evaluates on other data"),
        ({"methods": [{"method": "saft", "density": 2}]}, "--density must be above 0"),
        ({"models": [{"model": "saft-tiny", "lr": 1}]}, "the model saft-tiny has an unknown"),
        ({"models": [{"pretrained": "x"}]}, "does not say which model it is"),
        ({"settings": {"output": "x"}}, "sets output, which an experiment decides itself"),
        ({"settings": 3}, "settings must be settings"),
        ({"shots": [-1]}, "shots must be whole numbers from 0"),
        ({"shots": [1.5]}, "shots must be whole numbers"),
        ({"seeds": []}, "seeds must name at least one"),
        ({"seeds": [1, 1]}, "seeds has 1 twice"),
        ({"alphas": [2]}, "alphas must be numbers from 0 to 1"),
        ({"train": 3}, "train must be texts"),
        ({"evaluate": []}, "shift evaluates on other data than it trains on"),
        ({"evaluate": ["builtin:mnist"]}, "shift evaluates on other data than it trains on"),
        ({"protocol": "base-to-new"}, "leave out builtin:uci"),
        (
            {"protocol": "base-to-new", "evaluate": [], "train": ["builtin:mnist#base"]},
            "divides the classes of builtin:mnist#base itself",
        ),
        ({"tuning": {"try": {"full": {"lr": [1, 2]}}}}, "number of trials, not full 2, saft 0"),
        ({"tuning": {"try": {"lp": {"lr": [1]}}}}, "'lp', which is not among methods"),
        ({"tuning": {"try": {"full": {"lr": []}}}}, "try of full has nothing to try"),
        ({"tuning": {"seed": 1}}, "tuning does not say what to try"),
        ({"tuning": {"tries": 1}}, "tuning has an unknown setting 'tries'"),
    ],
)  # fmt: skip
def test_a_wrong_plan_is_refused_in_one_sentence(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- 1", "a: [", "", "protocol: shift"])
def test_what_is_no_plan_is_refused(tmp_path, text):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.yaml"):
        Plan.load(file)
    with pytest.raises(ConfigError, match=r"plan\.yaml"):
        make_plan("shift", {}, file)


def test_settings_for_all_pass_by_methods_that_have_none_such():
    made = plan(settings={"alpha": 0.3, "penalty": 2.0}, methods=["saft", "kd", "lora"])
    configs = {
        entry.settings["method"]: made.config(made.models[0], entry, "builtin:mnist", 1, 1, {})
        for entry in made.methods
    }
    assert configs["saft"].alpha == 0.3
    assert configs["saft"].penalty is None
    assert configs["kd"].penalty == 2.0
    assert configs["lora"].alpha is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_has_a_plan_that_needs_no_data(protocol):
    made = make_plan(protocol, {}, None)
    assert made.protocol == protocol
    assert {entry.settings["method"] for entry in made.methods} >= {"zero-shot", "full", "saft"}
    for cell in itertools.chain(trial_cells(made, Path("x")), final_cells(made, Path("x"), {})):
        assert cell.config.model == "saft-tiny"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_real_data_get_the_papers_settings(protocol):
    given = {"models": ["ViT-B-16"], "train": ["~/imagenet"], "seeds": [1]}
    others = {"evaluate": ["~/imagenetv2"]} if find_protocol(protocol).others else {}
    without = {key: value for key, value in (given | others).items() if key != "models"}
    made = make_plan(protocol, given | others, None)
    assert made.tuning is None
    cells = list(final_cells(made, Path("x"), {}))
    assert {cell.config.weights for cell in cells} == {"openai"}
    saft = next(cell.config for cell in cells if cell.config.method == "saft")
    assert (saft.lr, saft.shots, saft.epochs) == (5e-6, 16, 10)
    models = [entry.settings["model"] for entry in make_plan(protocol, without, None).models]
    assert models == (["RN50", "ViT-B-32", "ViT-B-16"] if protocol == "ablation" else ["ViT-B-16"])
    with pytest.raises(ConfigError, match="nothing to train ViT-B-16 on"):
        make_plan(protocol, {"models": ["ViT-B-16"]}, None)


def test_options_win_over_the_plan(tmp_path):
    file = tmp_path / "plan.yaml"
    plan(tuning=TUNED, settings={"epochs": 2}).save(file)
    made = make_plan(
        "shift",
        {"methods": ["zero-shot", "saft"], "seeds": [7], "device": "cuda", "pretrained": "w.bin"},
        file,
    )
    assert [entry.name for entry in made.methods] == ["zero-shot", "saft"]
    assert made.tuning is not None
    assert list(made.tuning.tried) == ["saft"]
    own = make_plan("shift", {"methods": ["zero-shot", "saft", "lp"]}, None).methods
    assert own[1].settings["density"] == 0.05  # the plan's own entry
    assert own[2].settings == {"method": "lp"}
    assert made.settings == {"epochs": 2, "device": "cuda"}
    assert made.models[0].settings == {"model": "saft-tiny", "pretrained": "w.bin"}
    assert made.seeds == (7,)
    with pytest.raises(ConfigError, match="is one for shift: run saft experiment shift"):
        make_plan("sparsity", {}, file)


# Protocols and cells ------------------------------------------------------------------------------


def test_what_each_protocol_trains_and_evaluates_on():
    shift = tasks(plan(train=["a", "b"], evaluate=["a", "c"]))
    assert [(task.train, task.roles) for task in shift] == [
        ("a", {"a": "in", "c": "shifted"}),
        ("b", {"b": "in", "a": "shifted", "c": "shifted"}),
    ]
    halves = tasks(plan(protocol="base-to-new", evaluate=[], train=["a"]))
    assert [(task.train, task.roles) for task in halves] == [
        ("a#base", {"a#base": "base", "a#new": "new"})
    ]
    cross = tasks(plan(protocol="cross-dataset", train=["a"], evaluate=["b"]))
    assert cross[0].roles == {"a": "source", "b": "target"}


def test_the_cells_of_a_plan():
    made = plan(shots=[1, 4], seeds=[1, 2], alphas=[0.5], tuning=TUNED, retrieval=["3"])
    trials = list(trial_cells(made, Path("x")))
    assert [(cell.contest[2], cell.trial) for cell in trials] == [
        ("full", {"lr": 1e-5}), ("full", {"lr": 1e-4}),
        ("saft", {"density": 0.01}), ("saft", {"density": 0.1, "lr": 1e-3}),
    ]  # fmt: skip
    for cell in trials:  # test images have no part in it
        assert cell.config.eval_data == ("builtin:mnist",)
        assert (cell.config.eval_split, cell.config.alphas) == ("val", ())
    contest = ("saft-tiny", "builtin:mnist", "saft")
    cells = list(final_cells(made, Path("x"), {contest: {"density": 0.1, "lr": 1e-3}}))
    # zero-shot once; full, whose trials have found nothing, not at all.
    assert [cell.contest[2] for cell in cells] == ["zero-shot"] + ["saft"] * 4
    saft = cells[1:]
    assert [(cell.shots, cell.seed) for cell in saft] == [(1, 1), (1, 2), (4, 1), (4, 2)]
    assert {(c.config.density, c.config.lr, c.config.alphas) for c in saft} == {(0.1, 1e-3, (0.5,))}
    assert [bool(cell.retrieval) for cell in cells] == [True, False, False, True, False]
    assert all(cell.config.eval_split == "test" for cell in cells)


def test_folders_of_cells_differ_and_stay_the_same():
    methods = ["full", *({"name": name, "method": "full"} for name in ("f:ull", "f-ull"))]
    made = plan(methods=methods, train=["a b", "a-b"], evaluate=["c"])
    names = [cell.name for cell in final_cells(made, Path("x"), {})]
    assert len(set(names)) == len(names) == 3 * 2 * 3
    assert names == [cell.name for cell in final_cells(made, Path("x"), {})]
    assert "cells/saft-tiny/a-b/f-ull/16-shots/seed-1" in names
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-/.") for name in names)


# Statistics ---------------------------------------------------------------------------------------


def test_an_estimate_is_the_mean_with_its_standard_error():
    found = estimate([0.1, 0.2, 0.6])
    assert found.mean == pytest.approx(0.3)
    assert found.error == pytest.approx(statistics.stdev([0.1, 0.2, 0.6]) / math.sqrt(3))
    assert math.isnan(estimate([0.5]).error)


def test_harmonic_means_are_the_papers():
    assert round(100 * harmonic_mean(0.8397, 0.7478), 2) == 79.11  # SAFT, Table 2
    assert harmonic_mean(0, 0) == 0
    for row in PAPER["base-to-new"][1]:
        mean = 100 * harmonic_mean(row.values["base"] / 100, row.values["new"] / 100)
        assert mean == pytest.approx(row.values["harmonic mean"], abs=0.01)


def test_p_values_of_cases_counted_by_hand():
    zero = dict.fromkeys(range(5), 0.0)
    # All five differences above 0: of 32 choices of signs, 2 have a mean as far from 0.
    assert p_value(dict(enumerate([0.1, 0.2, 0.1, 0.3, 0.2])), zero) == pytest.approx(2 / 32)
    # 1, 1, -1 has a mean of 1/3: only 1, 1, 1 and its opposite... all have at least that.
    assert p_value(dict(enumerate([1.0, 1.0, -1.0])), zero) == pytest.approx(1.0)
    assert p_value(zero, zero) == 1.0
    assert p_value({1: 0.5}, {2: 0.5}) is None
    # What cannot be paired does not count.
    assert p_value({0: 0.1, 9: 5.0}, zero) == pytest.approx(1.0)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20))
def test_p_values_have_no_side(values):
    ours, zero = dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0)
    p = p_value(ours, zero)
    assert p is not None
    assert 0 < p <= 1
    assert p_value(zero, ours) == pytest.approx(p, abs=0.03)


def test_holm_as_counted_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert holm({}) == {}


def test_the_bound_by_hand():
    assert occam_bound(0, 100, delta=0.05) == pytest.approx(math.sqrt(math.log(40) / 200))
    assert occam_bound(100, 50, 0.1) == pytest.approx(
        math.sqrt((100 * math.log(2) + math.log(20)) / 100)
    )
    # Which 2 of 4: 6 choices.
    assert description_bits("saft", 2, 4) == pytest.approx(64 + math.log2(6))
    assert description_bits("full", 4, 4) == 128
    assert description_bits("random", 2, 4) == 64


# Tables -------------------------------------------------------------------------------------------

ACCURACIES = {
    "zero-shot": (0.80, 0.70),
    "full": (0.90, 0.60),
    "saft": (0.88, 0.75),
}


def made_record(seeds=6, **values):
    """What an experiment might find: each method with its own accuracy, a little more by seed."""
    the_plan = plan(seeds=list(range(seeds)), **values)
    record = Record(the_plan, Path("folder"), names={"builtin:mnist": "mnist"})
    for task in tasks(the_plan):
        for name, (own, other) in ACCURACIES.items():
            for seed, shots in itertools.product(range(seeds), the_plan.shots):
                for number, (data, role) in enumerate(task.roles.items()):
                    top1 = own if role in ("in", "base", "source") else other + 0.01 * number
                    if name != "zero-shot":
                        top1 += 0.001 * seed
                    row = Row("saft-tiny", name, task.train, shots, seed, data, role, top1, 100)
                    record.rows.append(row)
    return record


def test_a_table_of_a_shift():
    (table,) = accuracy_tables(made_record())
    assert table.columns == ["mnist", "builtin:uci", "builtin:fonts", "mean of shifted"]
    assert table.title == "mnist: saft-tiny, 16 images per class"
    mean = {name: values[-1] for name, values in table.rows.items()}
    assert mean["saft"].estimate.mean == pytest.approx(0.75 + 0.015 + 0.0025)
    steps = [0.001 * seed for seed in range(6)]
    assert mean["saft"].estimate.error == pytest.approx(statistics.stdev(steps) / math.sqrt(6))
    assert math.isnan(mean["zero-shot"].estimate.error)  # nothing was drawn
    assert [mean[name].place for name in ("saft", "zero-shot", "full")] == [1, 2, 0]
    # 12 pairs, all of the same sign: p = 2 / 4096, times 2 by Holm.
    assert mean["saft"].p_values == pytest.approx({"full": 4 / 4096, "zero-shot": 4 / 4096})
    assert mean["saft"].signs == {"full": 1, "zero-shot": 1}
    assert mean["full"].signs == {"zero-shot": -1}
    assert mean["zero-shot"].signs == {"full": 1}
    assert "full" not in mean["full"].p_values


def test_few_pairs_are_not_significant():
    (table,) = accuracy_tables(made_record(seeds=3))
    assert table.rows["saft"][0].signs == {}  # three pairs: p is 1/4 at least
    assert table.rows["saft"][0].p_values["full"] >= 0.25


def test_one_seed_says_nothing_of_others():
    (table,) = accuracy_tables(made_record(seeds=1))
    assert all(value.p_values == {} for values in table.rows.values() for value in values)


def test_a_table_of_base_and_new_classes():
    record = made_record(protocol="base-to-new", evaluate=[], train=["builtin:mnist", "builtin:x"])
    summary, first, second = accuracy_tables(record)
    assert summary.columns == first.columns == second.columns == ["base", "new", "harmonic mean"]
    values = first.rows["zero-shot"]
    assert values[2].estimate.mean == pytest.approx(harmonic_mean(0.80, 0.71))
    assert summary.rows["zero-shot"][2].estimate.mean == pytest.approx(harmonic_mean(0.80, 0.71))
    assert values[2].p_values == {}


def test_a_mean_needs_all_its_data_and_seeds_without_are_left_out():
    record = made_record()
    lost = {("saft", 0, "builtin:uci"), ("full", 0, "builtin:uci")}
    record.rows = [row for row in record.rows if (row.method, row.seed, row.data) not in lost]
    record.rows = [
        row for row in record.rows if row.method != "full" or row.data != "builtin:fonts"
    ]
    (table,) = accuracy_tables(record)
    assert table.rows["saft"][1].estimate.n == table.rows["saft"][3].estimate.n == 5
    assert table.rows["saft"][2].estimate.n == 6
    assert table.rows["full"][2] is None
    assert table.rows["full"][3] is None


def test_equal_accuracies_share_their_place():
    record = made_record()
    record.rows = [
        Row(**{**row.__dict__, "top1": 0.5 if row.data == "builtin:uci" else row.top1})
        for row in record.rows
    ]
    (table,) = accuracy_tables(record)
    assert [values[1].place for values in table.rows.values()] == [1, 1, 1]


def test_rows_on_the_way_and_of_training_images_are_not_results():
    record = made_record()
    before = accuracy_tables(record)
    row = record.rows[-1]
    record.rows.append(Row(**{**row.__dict__, "alpha": 0.5, "top1": 0.0}))
    record.rows.append(Row(**{**row.__dict__, "role": "train", "top1": 0.0}))
    assert accuracy_tables(record) == before


# Formats ------------------------------------------------------------------------------------------

ODD = r"a|b_c*&$%{x}~^\ <i>"


def odd_record():
    record = made_record(methods=["zero-shot", "full", "saft", {"name": ODD, "method": "lp"}])
    return record


def test_markdown():
    text = formats.markdown(accuracy_tables(odd_record()), odd_record())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace(r"\|", "").count("|") for line in rows[:6]} == {6}
    assert "| saft | *88.25 ± 0.08* | **" in text
    assert "**76.75 ± 0.08** ↑f ↑z |" in text
    assert "61.75 ± 0.08 ↓z |" in text
    assert r"a\|b\_c\*\&$%{x}\~^\\ \<i\>" in text
    assert "not measured here" in text
    assert "+5.15" in text


def test_latex():
    text = formats.latex(accuracy_tables(odd_record()), odd_record())
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    name = r"{}a\textbar{}b\_c*\&\$\%\{x\}\textasciitilde{}\textasciicircum{}\textbackslash{} "
    assert name + r"\textless{}i\textgreater{}" in text
    assert r"\textbf{76.75 $\pm$ 0.08}$^{\uparrow f\uparrow z}$" in text
    assert r"61.75 $\pm$ 0.08$^{\downarrow z}$" in text
    assert r"\underline{88.25 $\pm$ 0.08} &" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert {line.count(" & ") for line in body.strip().splitlines()} == {4}


def test_comma_separated():
    record = odd_record()
    lines = list(csv.DictReader(io.StringIO(formats.comma_separated(accuracy_tables(record)))))
    assert len(lines) == 3 * 4
    (line,) = (x for x in lines if (x["method"], x["column"]) == ("saft", "mean of shifted"))
    assert float(line["mean"]) == pytest.approx(0.7675)
    assert float(line["p_full"]) == pytest.approx(4 / 4096)
    assert (line["seeds"], line["place"], line["shots"]) == ("6", "1", "16")
    rows = list(csv.DictReader(io.StringIO(formats.results_csv(record))))
    assert len(rows) == len(record.rows)
    assert float(rows[0]["top1"]) == record.rows[0].top1


def test_the_terminal_shows_names_as_they_are():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    (table,) = accuracy_tables(made_record(methods=["zero-shot", {"name": "[b]x", "method": "lp"}]))
    console.print(formats.for_terminal(table))
    assert "[b]x" in console.file.getvalue()


# Pages --------------------------------------------------------------------------------------------


def results(method, trained=1000):
    block = {
        "encoder": "image",
        "block": "1",
        "kind": "mlp",
        "trained": trained,
        "parameters": 5000,
    }
    return {
        **{"method": method, "trained": trained, "parameters": 10_000, "artefact_bytes": 4000},
        "cost": {"step_seconds": None if method == "zero-shot" else 0.1, "peak_memory_bytes": None},
        **{"blocks": [block], "environment": {"torch": "2"}, "evaluations": []},
        "density_trials": [],
    }


def test_densities_that_runs_chose():
    trial = {"density": 0.001, "lr": 0.003, "top1": 0.75, "top1_stderr": 0.1, "images": 20}
    tried = [
        {**trial, "error": None, "chosen": True},
        {**trial, "density": 0.01, "top1": None, "error": "diverged", "chosen": False},
    ]
    record = made_record(1, methods=["zero-shot", {"name": "auto", "method": "saft"}])
    assert formats.densities_csv(with_runs(record)) == ""
    record.runs[-1].results["density_trials"] = tried
    lines = list(csv.DictReader(io.StringIO(formats.densities_csv(record))))
    assert [line["method"] for line in lines] == ["auto", "auto"]
    assert [line["seed"] for line in lines] == ["0", "0"]
    assert [line["density"] for line in lines] == ["0.001", "0.01"]
    assert [line["top1"] for line in lines] == ["0.75", ""]
    assert [line["chosen"] for line in lines] == ["yes", ""]
    (line,) = page.page_content(record, accuracy_tables(record))["automatic"]
    assert line == {
        **{"model": "saft-tiny", "data": "mnist", "method": "auto", "runs": 1},
        "chosen": "0.001: 1, 0.01: 0",
    }


def test_densities_have_a_file_and_a_table_where_there_are_any(tmp_path, monkeypatch):
    record = with_runs(made_record(1, methods=["zero-shot", {"name": "auto", "method": "saft"}]))
    monkeypatch.setattr(page, "read_record", lambda folder: record)
    tried = {"density": 0.01, "lr": 0.001, "top1": 0.5, "chosen": True}
    for trials, there in (([tried], True), ([], False)):
        record.runs[-1].results["density_trials"] = trials
        page.write_answers(tmp_path)
        assert (tmp_path / "densities.csv").exists() == there
        assert ("Densities that runs chose" in (tmp_path / "report.html").read_text()) == there


def with_runs(record):
    for cell in final_cells(record.plan, record.folder, {}):
        record.runs.append(Run(cell, results(cell.config.method)))
        if cell.config.method != "zero-shot":
            model, train, name = cell.contest
            record.rows.append(
                Row(model, name, train, cell.shots, cell.seed, train, "train", 1.0, 160)
            )
    return record


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_page_of_every_protocol(protocol, tmp_path):
    others = {} if find_protocol(protocol).others else {"evaluate": []}
    methods = ["zero-shot", "full", "saft", {"name": ODD, "method": "saft", "density": 0.1}]
    methods += [{"name": "saft dense", "method": "saft", "density": 1.0}]
    record = with_runs(
        made_record(protocol=protocol, methods=methods, shots=[1, 16], alphas=[0.5], **others)
    )
    record.failures = [{"cell": "c", "command": "saft <b>", "error": "no", "traceback": "T < U"}]
    record.missing = 2
    content = page.page_content(record, accuracy_tables(record))
    page.write_page(tmp_path / "out.html", "experiment.html.j2", content)
    found = Page((tmp_path / "out.html").read_text())
    assert found.open == []
    assert [link for link in found.loaded if not link.startswith("#")] == []
    assert len(found.ids) == len(set(found.ids))
    for text in (ODD.replace("  ", " "), "saft <b>", "T < U", "1 of the runs failed", "mnist"):
        assert text in found.text, text
    assert ("not measured here" in found.text) == (protocol in PAPER)


def test_a_page_of_an_experiment_that_has_found_nothing(tmp_path):
    record = Record(plan(), tmp_path)
    content = page.page_content(record, accuracy_tables(record))
    page.write_page(tmp_path / "out.html", "experiment.html.j2", content)
    assert Page((tmp_path / "out.html").read_text()).open == []


def test_gaps_are_training_minus_test_accuracy():
    found = {gap.method: gap for gap in gaps(with_runs(made_record()))}
    assert set(found) == {"full", "saft"}
    assert found["saft"].measured.mean == pytest.approx(1 - 0.8825)
    assert found["saft"].bits > found["full"].bits  # it also has to say where
    assert found["saft"].n == 160


def test_costs_are_medians():
    record = with_runs(made_record(seeds=3))
    for run, seconds in zip([r for r in record.runs if r.cell.contest[2] == "saft"], (5, 1, 2)):  # noqa: B905
        run.results["cost"]["step_seconds"] = seconds
    costs = {cost.method: cost for cost in cost_table(record, "saft-tiny")}
    assert costs["saft"].step_seconds == 2
    assert costs["zero-shot"].step_seconds is None
    assert costs["saft"].share == 0.1


def test_every_method_looks_different():
    made = plan(methods=list(METHODS))
    looks = pictures.looks(Record(made, Path("x")))
    kinds = [tuple(look.values()) for look in looks.values()]
    assert len(set(kinds)) == len(METHODS)


def test_a_density_without_a_number_is_no_point_of_the_curve():
    """Of a method whose runs choose it themselves: it is drawn as a line across."""
    record = made_record(
        methods=[
            *({"name": n, "method": "saft", "density": d} for n, d in (("a", 0.001), ("b", 0.01))),
            {"name": "c", "method": "saft", "density": "auto"},
        ]
    )
    template = record.rows[0]
    record.rows = [
        replace(template, method=name, data=data, role=role, top1=0.5)
        for name in "abc"
        for data, role in (("builtin:mnist", "in"), ("builtin:uci", "shifted"))
    ]
    picture = pictures.density_figure(record, "saft-tiny", template.shots)
    assert [picture.count(f">{label}<") for label in ("saft", "a", "b", "c")] == [1, 0, 0, 1]
    assert page.page_content(record, accuracy_tables(record))["densities"]


# Best images --------------------------------------------------------------------------------------


class Ones(torch.nn.Module):
    """A model without anything."""


def test_the_best_images_of_each_class():
    images = [np.full((8, 8, 3), value, np.uint8) for value in (10, 200, 90, 200, 50, 60, 70)]
    opened = []

    def prepared(image):
        opened.append(image)
        return torch.tensor(np.asarray(image)[0, 0, :1] / 255.0)

    labels = torch.tensor([0, 1, 0, 1, 0, 0, 0])
    dataset = ImageDataset("grey", images, labels, ("dark", "light"), ("{}",), prepared)
    clip = type("Clip", (), {"model": Ones(), "tokenizer": None})()
    config = FinetuneConfig(train_data="x", model="saft-tiny", precision="fp32")
    scores = lambda prompts: lambda batch: torch.cat([-batch, batch], dim=1)  # noqa: E731
    turned = lambda prompts: lambda batch: torch.cat([batch, -batch], dim=1)  # noqa: E731
    models = [(clip, scores), (clip, turned)]
    (dark, light), other = retrieval.top_images(models, dataset, [0, 1], config)
    assert other == [light, dark]
    assert len(opened) == len(dataset)  # once for both
    assert retrieval.top_images(models[:1], dataset, [1], config) == [[light]]
    assert dark == [0, 4, 5, 6, 2]
    assert light == [1, 3, 2, 6, 5]  # of equal ones, the first
    same = replace(dataset, images=[images[0]] * 1000, labels=torch.zeros(1000, dtype=torch.int64))
    assert retrieval.top_images(models[:1], same, [0], config) == [[[0, 1, 2, 3, 4]]]


def test_a_picture_is_small_and_whole():
    uri = retrieval.data_uri(Image.new("RGB", (500, 300), (1, 2, 3)))
    assert uri.startswith("data:image/png;base64,")
    assert len(uri) < 2000


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[{}]",
        "nope",
        '{"classes": [], "found": [{"data": "a", "dataset": "b", "class": "c", "before": [], '
        '"after": [{"index": 0, "right": true, "picture": "http://elsewhere"}]}]}',
    ],
)
def test_broken_retrieval_files_are_refused(tmp_path, content):
    file = tmp_path / "retrieval.json"
    file.write_text(content)
    with pytest.raises(CheckpointError, match=r"retrieval\.json"):
        retrieval.read_retrieval(file)


def test_the_study_s_plans_are_whole():
    folder = Path(__file__).parents[1] / "docs" / "study"
    files = sorted(folder.glob("*.yaml"))
    assert {"shift.yaml", "base-to-new.yaml", "cross-dataset.yaml"} <= {file.name for file in files}
    for file in files:
        made = Plan.from_dict(yaml.safe_load(file.read_text()), str(file))
        assert len(made.seeds) >= 5
        assert (made.tuning is None) == (file.name == "shots.yaml")  # its settings are shift's


def test_a_cell_is_named_by_what_it_is():
    cell = next(iter(final_cells(plan(), Path("x"), {})))
    assert not cell.finished()
    assert isinstance(cell, Cell)
    assert cell.name.startswith("cells/saft-tiny/builtin-mnist-")
    assert cell.config.output == f"x/{cell.name}"

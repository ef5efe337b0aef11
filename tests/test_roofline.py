"""The model of times on GPUs: its arithmetic, and that nobody can take its figures for measured."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import roofline
from bench.cli import RESULTS
from bench.models import (
    COLUMNS,
    ROWS,
    Setting,
    candidates,
    concentrated_entries,
    make_task,
    uniform_entries,
)
from bench.outcome import Outcome, Timing
from bench.ratios import format_seconds
from bench.result_file import FORMAT, VERSION, ResultError, outcome_record, write_result
from bench.roofline import GPUS, OPERATIONS, Gpu, Work
from saft_kernels.triton import accumulate_topk as triton_topk

A100, H100, H200, MI300X = GPUS

#: One byte per second, one operation per second, and accesses of 10 bytes.
SLOW = Gpu("slow", 1.0, 2.0, 1.0, 10, "none", "slow")


# Units --------------------------------------------------------------------------------------------


def test_datasheets() -> None:
    assert [gpu.bandwidth / 1e12 for gpu in GPUS] == [2.039, 3.35, 4.8, 5.3]
    assert [gpu.bf16 / 1e12 for gpu in GPUS] == [312, 989, 989, 1307]
    assert [gpu.fp32 / 1e12 for gpu in GPUS] == [19.5, 67, 67, 163.4]
    assert all("datasheet" in gpu.source for gpu in GPUS)


def test_seconds_of_bytes() -> None:
    assert Work(0, 0, 17.0).seconds_on(SLOW) == pytest.approx(17 / 0.85)
    assert Work(0, 0, 0, sectors=3).seconds_on(SLOW) == pytest.approx(30 / 0.5)
    assert Work(0, 0, 17.0, sectors=3).seconds_on(SLOW) == pytest.approx(20 + 60)
    assert Work(0, 0, 17.0, sectors=3).bytes_on(SLOW) == 47


def test_seconds_of_arithmetic_overlap_those_of_bytes() -> None:
    assert Work(0, 0, 0, flops=9).seconds_on(SLOW) == pytest.approx(10)
    assert Work(0, 0, 0, flops=6, matrix=True).seconds_on(SLOW) == pytest.approx(5)
    assert Work(0, 0, 17.0, flops=6).seconds_on(SLOW) == pytest.approx(20)


def test_seconds_of_launches_and_waiting() -> None:
    empty = Work(3, 5, 0.0, waits=4)
    assert empty.seconds_on(SLOW) == pytest.approx(3 * 2e-6 + 4 * 0.8e-6)
    assert empty.host_seconds == pytest.approx(5e-5)


def test_works_add_up() -> None:
    both = Work(1, 2, 3, 4, 5, False, 6) + Work(10, 20, 30, 40, 50, True, 60)
    assert both == Work(11, 22, 33, 44, 55, True, 66)


@pytest.mark.parametrize("what", ["launches", "streamed", "sectors", "flops", "waits"])
def test_more_of_anything_is_never_faster(what: str) -> None:
    for operation in OPERATIONS.values():
        for gpu in GPUS:
            work = operation.work(gpu)
            more = replace(work, **{what: 2 * getattr(work, what) + 1})
            assert more.seconds_on(gpu) >= work.seconds_on(gpu) > 0


def test_a_faster_gpu_is_never_slower() -> None:
    for operation in OPERATIONS.values():
        work = operation.work(H100)
        assert work.seconds_on(A100) >= work.seconds_on(H100) >= work.seconds_on(H200)
        assert work.seconds_on(H200) >= work.launches * roofline.LAUNCH


# Sizes --------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_benchmark() -> None:
    params = candidates(make_task(roofline.MODEL, 1, 1).model)
    assert sum(param.numel() for param in params.values()) == roofline.NUMEL
    assert len(params) == roofline.TENSORS
    large = [param for param in params.values() if param.numel() > triton_topk.ALONE]
    assert len(large) == roofline.LARGE_TENSORS
    assert params["token_embedding.weight"].shape == (roofline.VOCABULARY, roofline.EMBEDDING)
    layer = params["visual.transformer.resblocks.0.mlp.c_fc.weight"]
    assert layer.shape == (roofline.HEIGHT, roofline.WIDTH)
    assert (Setting().model, Setting().density) == (roofline.MODEL, roofline.DENSITY)
    assert roofline.ENTRIES == 149_620
    assert (ROWS, COLUMNS) == (0.32, 0.08)


@pytest.mark.parametrize(
    ("kind", "draw"), [("uniform", uniform_entries), ("concentrated", concentrated_entries)]
)
def test_used_rows_and_columns_are_what_is_drawn(kind: str, draw: Any) -> None:
    height, width = roofline.HEIGHT, roofline.WIDTH
    flat = draw(height, width, int(roofline.DENSITY * height * width))
    rows, columns = roofline.used_rows_and_columns(kind)
    assert rows == pytest.approx((flat // width).unique().numel(), rel=0.02)
    assert columns == pytest.approx((flat % width).unique().numel(), rel=0.02)


def test_expected_distinct() -> None:
    assert roofline.expected_distinct(10, 1, 4) == pytest.approx(4)  # no two in one bin
    assert roofline.expected_distinct(1, 50, 3) == 1
    assert roofline.expected_distinct(7, 5, 31) == 7  # six bins have no more than 30
    # Two of four: both in the same bin of two with probability 1/3.
    assert roofline.expected_distinct(2, 2, 2) == pytest.approx(2 - 1 / 3)


# Bytes, by hand -----------------------------------------------------------------------------------


#: GB: one time the k best and half a room of 2**20 candidates, 24 bytes each.
DROPPED = 24e-9 * (149_620 + 2**19)


@pytest.mark.parametrize(
    ("name", "gigabytes", "launches"),
    [
        ("accumulate_topk, fp32 gradients", 12 * 0.149620736 + DROPPED, 338),
        ("accumulate_topk, bf16 gradients", 10 * 0.149620736 + DROPPED, 338),
        ("acc.add_(grad), fp32 gradients", 12 * 0.149620736, 301),
        ("torch.topk on the concatenation", 20 * 0.149620736, 15),
        # two vectors read and written before, eight passes over positions and order after
        (roofline.WITH_CONCATENATION, 36 * 0.149620736 + 256 * 149_620e-9, 39),
        # 9 for the tensors, 8 for 2284 pieces, 3 for the step counts
        ("torch.optim.AdamW(fused=True), fp32", 28 * 0.149620736, 20),
        ("torch.optim.AdamW(fused=True), bf16", 14 * 0.149620736, 20),
        # per entry: index 4, moments 16, gradient 4 or a sector of 32, weight 2 * 32
        ("sparse_adamw_, compact gradients, fp32", 149_620 * 88e-9, 2),
        ("sparse_adamw_, dense gradients, fp32", 149_620 * 116e-9, 2),
        # and master values read and written
        ("sparse_adamw_, compact gradients, bf16", 149_620 * 96e-9, 2),
        ("sparse_adamw_, dense gradients, bf16", 149_620 * 124e-9, 2),
        # per entry: index 4, sector 32, value written 4, read 4, written 4
        ("gather, streamed, fp32", 149_620 * 48e-9, 602),
        ("scatter_, fp32", 149_620 * 72e-9, 301),
        # x [3152, 768], dy [3152, 3072] and dW [3072, 768]
        ("dense product, 3,152 tokens, bf16", 2 * (3152 * 3840 + 3072 * 768) * 1e-9, 1),
        ("dense product, 25,216 tokens, fp32", 4 * (25216 * 3840 + 3072 * 768) * 1e-9, 1),
        # zeros [49408, 512] and three times [1232, 512]
        ("embedding_dense_backward, fp32", 4 * 512 * (49408 + 3 * 1232) * 1e-9, 8),
    ],
)
def test_bytes_and_launches(name: str, gigabytes: float, launches: int) -> None:
    work = OPERATIONS[name].work(H100)
    assert work.bytes_on(H100) / 1e9 == pytest.approx(gigabytes, rel=1e-6)
    assert work.launches == launches


def test_time_of_the_dense_step_by_hand() -> None:
    """28 bytes of each weight at 85% of 3.35 TB/s, and 20 launches that wait once."""
    seconds = OPERATIONS["torch.optim.AdamW(fused=True), fp32"].work(H100).seconds_on(H100)
    assert seconds == pytest.approx(28 * 149_620_736 / 2.8475e12 + 56e-6)
    assert 1.52e-3 < seconds < 1.54e-3


def test_time_of_a_scan_by_hand() -> None:
    """A tensor that fills half of the room drops nothing: its bytes, a launch, 8/3 accesses."""
    work = roofline.offer(1000, 2000, 1, 0)
    seconds = 2e-6 + 8 / 3 * 0.8e-6 + 4 * 2000 / 2.8475e12
    assert work.seconds_on(H100) == pytest.approx(seconds)


def test_candidates_are_dropped_as_often_as_half_of_the_room_is_full() -> None:
    assert roofline.drops(20, 30_000).streamed == 0  # 20 ln 1500 = 146 candidates
    dropped = roofline.drops(2**20, 2**24)  # 2**20 ln 16 is 5.5 times half of the room
    assert dropped.streamed == 24 * 5 * (2**20 + 2**19)
    assert dropped.waits == 5 * (2**20 + 2**19) / 2048


def test_selection_is_its_parts() -> None:
    whole = OPERATIONS["selection from sums, finish included"].work(H100)
    assert whole.launches == 338 + OPERATIONS["finish"].work(H100).launches
    parts = 4 * roofline.NUMEL + OPERATIONS["finish"].work(H100).streamed
    assert whole.streamed == pytest.approx(parts + 1e9 * DROPPED)


def test_sampled_gradient_reads_whole_sectors() -> None:
    """With 8 fp32 features in a sector of 32 bytes, one used row costs as much as eight."""
    one, eight = (roofline.sectors_per_token(3072, used, 4, H100) for used in (1, 3072))
    assert (one, eight) == (pytest.approx(1), 384)
    work = roofline.sampled_grad(1000, 50, 3072, 10, 4, H100)
    assert work.streamed == pytest.approx(1000 * (10 * 4 + 3072 * 4) + 8 * 50 + 8 * 3072)
    assert work.flops == 2 * 1000 * 50
    packed = roofline.pack_columns(1000, 1, 768, 2, H100)
    assert packed.streamed == pytest.approx(1000 * (32 + 2))
    wider = roofline.pack_columns(1000, 1, 768, 2, MI300X)
    assert wider.streamed == pytest.approx(1000 * (128 + 2))


def test_sampled_operations_move_less_than_dense_ones() -> None:
    for operation in OPERATIONS.values():
        if operation.baseline is None or "accumulate" in operation.name:
            continue
        for gpu in GPUS:
            ours, theirs = (OPERATIONS[n].work(gpu) for n in (operation.name, operation.baseline))
            assert ours.bytes_on(gpu) <= theirs.bytes_on(gpu), operation.name


# Tables -------------------------------------------------------------------------------------------


def test_every_figure_is_marked_as_the_models() -> None:
    text = roofline.markdown()
    assert text.startswith("Figures of a model, not measurements.")
    assert "measured" not in text
    headers = [line for line in text.splitlines() if line.startswith("| operation")]
    assert len(headers) == 2
    for header in headers:
        columns = [cell.strip() for cell in header.strip("|").split("|")]
        unmarked = [column for column in columns if "(model)" not in column]
        assert set(unmarked) <= {"operation", "launches", "baseline"}


def test_table_holds_every_operation_and_gpu() -> None:
    lines = roofline.markdown().splitlines()
    for operation in OPERATIONS.values():
        (line, *ratio) = [line for line in lines if line.startswith(f"| {operation.name} |")]
        for gpu in GPUS:
            seconds = operation.work(gpu).seconds_on(gpu)
            assert format_seconds(seconds) in line
        assert len(ratio) == (operation.baseline is not None)
    speed = roofline.speed_up(OPERATIONS["sparse_adamw_, compact gradients, fp32"], H100)
    assert any(f"| {speed:.3g} |" in line for line in lines)


def test_assumptions_are_stated() -> None:
    introduction = roofline.markdown().partition("\n")[0]
    for assumption in ("2 µs", "0.8 µs", "85%", "50%", "60%", "90%", "10 µs", "149,620,736", "301"):
        assert assumption in introduction


# Beside measurements ------------------------------------------------------------------------------


@pytest.fixture
def result() -> dict[str, Any]:
    """As ``python -m bench gpu`` writes it; the times are made up."""
    names = ("sparse_adamw_, compact gradients, fp32 (cuda)", "sparse_adamw_, other (cuda)",
             "torch.optim.AdamW(fused=True), fp32")  # fmt: skip
    timings = [Timing("step", name, [2e-5, 2.2e-5, 2.4e-5], [1.0] * 3) for name in names]
    case = outcome_record(Outcome(timings))
    where = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2031-02-03T04:05"}
    return {
        "format": FORMAT,
        "version": VERSION,
        "environment": where,
        "setting": {"model": "ViT-B-16", "density": 1e-3},
        "cases": {"gpu": case},
    }


def test_measurement_stands_beside_the_model(result: dict[str, Any]) -> None:
    lines = roofline.markdown(result).splitlines()
    assert "| operation | backend | H100 (model) | measured | measured over model |" in lines
    work = OPERATIONS["sparse_adamw_, compact gradients, fp32"].work(H100)
    predicted = work.seconds_on(H100)
    assert (
        f"| sparse_adamw_, compact gradients, fp32 | cuda | {format_seconds(predicted)} "
        f"| 22.0 µs | {2.2e-5 / predicted:.2f} |" in lines
    )
    assert any(line.startswith("| torch.optim.AdamW(fused=True), fp32 | torch |") for line in lines)
    assert not any("sparse_adamw_, other" in line for line in lines)
    assert any("Measured on NVIDIA H100 80GB HBM3 (2031-02-03)" in line for line in lines)


@pytest.mark.parametrize("gpu", ["NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090", None])
def test_no_prediction_for_other_gpus(gpu: str | None, result: dict[str, Any]) -> None:
    result["environment"]["gpu"] = gpu
    if gpu is None:
        del result["environment"]["gpu"]
    with pytest.raises(ResultError, match=r"knows no (NVIDIA|no GPU)"):
        roofline.markdown(result)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", A100),
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H200", H200),
        ("AMD Instinct MI300X", MI300X),
    ],
)
def test_gpus_by_torchs_names(name: str, gpu: Gpu, result: dict[str, Any]) -> None:
    result["environment"]["gpu"] = name
    assert roofline.measured_gpu(result) is gpu


def test_no_prediction_for_other_sizes(result: dict[str, Any]) -> None:
    other = copy.deepcopy(result)
    other["setting"]["model"] = "saft-tiny"
    with pytest.raises(ResultError, match="saft-tiny"):
        roofline.markdown(other)


# Command line -------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        roofline.main(arguments)
    return int(stopped.value.code or 0)


def test_command_prints_the_tables(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    write_result(file, result)
    assert run() == 0
    assert capsys.readouterr().out == roofline.markdown()
    assert run("--measured", str(file)) == 0
    assert capsys.readouterr().out == roofline.markdown(result)
    assert run("--measured", str(tmp_path / "missing.json")) == 1
    assert "is no benchmark result" in capsys.readouterr().err


def test_documentation_holds_the_present_figures(tmp_path: Path) -> None:
    page = Path(__file__).parent.parent / "docs" / "gpu.md"
    copied = tmp_path / "gpu.md"
    copied.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    (measured,) = RESULTS.glob("nvidia-h200-*.json")
    assert run("--measured", str(measured), "--update", str(copied)) == 0
    assert copied.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
        "run: make bench-docs"
    )

"""A model of what the operations take on GPUs, from bytes, floating point operations and launches.

``python -m bench.roofline`` prints it for CLIP ViT-B/16 with 0.1% of its parameters selected;
``--measured RESULT.json`` puts a measurement of ``python -m bench gpu`` beside each prediction.
None of its figures is a measurement, and each is marked as the model's wherever it appears.

A launch starts when the one before it has ended, waits for what its threads need one after the
other, and takes as long as the slower of what it has to do::

    seconds = launches * LAUNCH + waits * LATENCY + max(memory, arithmetic)
    memory = streamed / (STREAMED * bandwidth) + sectors * sector / (SCATTERED * bandwidth)
    arithmetic = flops / (MATRIX * peak of matrix units, or PLAIN * peak without them)

What is read twice within a launch comes from the caches, at no cost (``saft_kernels.cost_model``,
which chooses between kernels, counts that too; at 0.1% it is not the bound). Called from Python one
by one, operations take ``calls * CALL`` at least, as long as the host needs to ask for them.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from saft_clip.console import say
from saft_kernels import topk
from saft_kernels.errors import SaftError

from . import result_file
from .outcome import Timing
from .ratios import format_seconds
from .result_file import outcome_of
from .tables import table

# Assumptions --------------------------------------------------------------------------------------

#: Seconds from the end of a launch to the start of the next one in the same stream.
LAUNCH = 2e-6

#: Share of the peak bandwidth that reading and writing in order reaches.
STREAMED = 0.85

#: Share of it that sectors reach which lie apart.
SCATTERED = 0.5

#: Shares of the peak rate that torch's large matrix products reach on matrix units, and without
#: them.
MATRIX = 0.6
PLAIN = 0.9

#: Seconds of the host for one operation called from Python, its share of the model's Python
#: included.
CALL = 10e-6

#: Seconds that an access to memory takes when nothing else is to be done.
LATENCY = 0.8e-6

#: Share of it that an access takes which the second level cache answers, atomics included.
CACHED = 1 / 3


# GPUs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """What a vendor says of a GPU.

    Attributes:
        name: in tables.
        bandwidth: of its memory, bytes/s.
        bf16: rate of dense bf16 products on matrix units, FLOP/s; that of fp16 is the same.
        fp32: rate of fp32 arithmetic without them, FLOP/s.
        sector: bytes that an access moves at least.
        source: of these numbers.
        known_as: what torch calls it; other variants have other numbers.
    """

    name: str
    bandwidth: float
    bf16: float
    fp32: float
    sector: int
    source: str
    known_as: str


GPUS = (
    Gpu("A100", 2.039e12, 312e12, 19.5e12, 32, "NVIDIA A100 80GB SXM datasheet", "A100-SXM4-80GB"),
    Gpu("H100", 3.35e12, 989e12, 67e12, 32, "NVIDIA H100 SXM datasheet", "H100 80GB HBM3"),
    Gpu("H200", 4.8e12, 989e12, 67e12, 32, "NVIDIA H200 datasheet", "H200"),
    # A line of the second level cache is 128 bytes.
    Gpu(
        "MI300X", 5.3e12, 1307e12, 163.4e12, 128,
        "AMD Instinct MI300X datasheet, CDNA 3 white paper", "MI300X",
    ),
)  # fmt: skip


# Work ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What an operation asks of a GPU.

    Attributes:
        launches: kernels, each of which waits for the one before it.
        calls: operations that Python calls.
        streamed: bytes read or written in order.
        sectors: sectors that lie apart, once for each time one is read or written.
        flops: floating point operations.
        matrix: whether matrix units do these.
        waits: accesses to memory of which each needs the result of the one before it, of all
            launches together; ``CACHED`` for one that the second level cache answers.
    """

    launches: int
    calls: int
    streamed: float
    sectors: float = 0.0
    flops: float = 0.0
    matrix: bool = False
    waits: float = 2

    def bytes_on(self, gpu: Gpu) -> float:
        """All bytes that move between the memory and the GPU."""
        return self.streamed + self.sectors * gpu.sector

    def seconds_on(self, gpu: Gpu) -> float:
        """The model's time on the GPU, in seconds, if the host is never late."""
        memory = self.streamed / (STREAMED * gpu.bandwidth)
        memory += self.sectors * gpu.sector / (SCATTERED * gpu.bandwidth)
        rate = MATRIX * gpu.bf16 if self.matrix else PLAIN * gpu.fp32
        waiting = self.launches * LAUNCH + self.waits * LATENCY
        return waiting + max(memory, self.flops / rate)

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(
            self.launches + other.launches,
            self.calls + other.calls,
            self.streamed + other.streamed,
            self.sectors + other.sectors,
            self.flops + other.flops,
            self.matrix or other.matrix,
            self.waits + other.waits,
        )

    @property
    def host_seconds(self) -> float:
        """The model's time of the host, in seconds, if every operation is called from Python."""
        return self.calls * CALL


# Sizes --------------------------------------------------------------------------------------------

#: The model whose sizes these are.
MODEL = "ViT-B-16"

#: Trainable parameters and tensors of its two encoders (with ``logit_scale``, which is never
#: trained, the model has one more of each).
NUMEL, TENSORS = 149_620_736, 301

#: Tensors of more than 2**20 elements, which a selection may have to read again.
LARGE_TENSORS = 37

DENSITY = 1e-3
ENTRIES = int(DENSITY * NUMEL)

#: A layer of the image tower's MLPs, and what goes through it: the tokens of 16 and 128 images.
HEIGHT, WIDTH = 3072, 768
TOKENS = (16 * 197, 128 * 197)

#: The token embedding, and 16 prompts with their padding.
VOCABULARY, EMBEDDING = 49_408, 512
PROMPT_TOKENS = 16 * 77

ELEMENT = {"fp32": 4, "bf16": 2}

#: Rows and columns of which the entries of a concentrated mask choose (``bench.models``).
CONCENTRATED_ROWS, CONCENTRATED_COLUMNS = int(0.32 * HEIGHT), int(0.08 * WIDTH)


def expected_distinct(bins: int, size: int, drawn: int) -> float:
    """How many of ``bins`` bins of ``size`` things each are hit when ``drawn`` things are drawn.

    Without replacement: bins * (1 - C((bins - 1) size, drawn) / C(bins size, drawn)).
    """
    total = bins * size
    if drawn > total - size:
        return float(bins)
    return bins * (1 - math.exp(_log_choose(total - size, drawn) - _log_choose(total, drawn)))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def used_rows_and_columns(kind: str) -> tuple[float, float]:
    """How many rows and columns of the layer hold the selected entries of a mask."""
    entries = int(DENSITY * HEIGHT * WIDTH)
    height, width = HEIGHT, WIDTH
    if kind == "concentrated":
        height, width = CONCENTRATED_ROWS, CONCENTRATED_COLUMNS
    return expected_distinct(height, width, entries), expected_distinct(width, height, entries)


def sectors_per_token(features: int, used: float, element: int, gpu: Gpu) -> float:
    """Sectors of one token's features that hold any of the used ones, spread uniformly."""
    per_sector = gpu.sector // element
    return expected_distinct(features // per_sector, per_sector, round(used))


# Operations ---------------------------------------------------------------------------------------


def accumulate_topk(k: int, numel: int, tensors: int, large: int, element: int) -> Work:
    """Read and write the fp32 sum, read the gradient: (8 + element) * numel bytes.

    One launch per tensor; after a large one, another one that mostly has nothing to do. A launch
    waits for its elements, and then in the cache for a place in the buffer, for its ticket, for the
    state, for a bin, and for writing the state; what has to be dropped comes on top.
    """
    return _offers(tensors, large, (8 + element) * numel) + drops(k, numel)


def offer(k: int, numel: int, tensors: int, large: int) -> Work:
    """The same without a gradient: read the fp32 sum, 4 * numel bytes."""
    return _offers(tensors, large, 4 * numel) + drops(k, numel)


def _offers(tensors: int, large: int, streamed: float) -> Work:
    waits = tensors * (1 + 5 * CACHED) + large * CACHED
    return Work(tensors + large, tensors, streamed, waits=waits)


def drops(k: int, numel: int) -> Work:
    """What the block that settles does beyond looking, over a whole selection.

    Of numel values in random order k (1 + ln(numel / k)) are among the k best when they come.
    Whenever those beyond k fill half of the room they are dropped, 2048 candidates at a time, each
    time waiting for memory once; 24 bytes for each candidate.
    """
    room = topk.room_for(k, "cuda") // 2
    times = math.floor(k * math.log(numel / k) / room)
    candidates = times * (k + room)
    return Work(0, 0, 24 * candidates, waits=math.ceil(candidates / 2048))


def add(numel: int, tensors: int, element: int) -> Work:
    """``acc.add_(grad)``: the same bytes, one launch per tensor."""
    return Work(tensors, tensors, (8 + element) * numel, waits=tensors)


def finish(k: int) -> Work:
    """Compact the candidates, k and half of the room at most, and sort the k that stay.

    One block compacts, 8192 candidates at a time, each time waiting for memory once: twice it looks
    for the threshold (4 bytes per candidate), then it moves what stays (24).
    """
    candidates = k + topk.room_for(k, "cuda") // 2
    compact = Work(1, 1, 32 * candidates, waits=3 * math.ceil(candidates / 8192))
    return compact + by_parameter(k)


def by_parameter(k: int) -> Work:
    """Sort k positions (8 passes of 32 bytes over them and their order), split them."""
    return Work(20, 15, 8 * 32 * k, waits=20)


def torch_topk(numel: int) -> Work:
    """``torch.topk`` of a vector of fp32 magnitudes: 4 passes for the 4 digits, 1 to collect.

    Each reads 4 * numel bytes, in about three launches.
    """
    return Work(15, 1, 5 * 4 * numel, waits=15)


def concatenation(numel: int) -> Work:
    """``torch.cat`` of all sums, three launches, and ``abs_``: 8 * numel bytes each."""
    return Work(4, 2, 2 * 8 * numel, waits=4)


def streamed_gather(entries: int, tensors: int, element: int) -> Work:
    """Per entry an index (4 bytes), a sector, its value written, read and written again in fp32.

    Two launches per tensor: gather, and the copy into the optimizer's vector.
    """
    streamed = (4 + 2 * element + 4) * entries
    return Work(2 * tensors, 2 * tensors, streamed, entries, waits=3 * tensors)


def scatter(entries: int, tensors: int, element: int) -> Work:
    """Per entry an index (4 bytes), a value, and a sector that is read and written."""
    return Work(tensors, tensors, (4 + element) * entries, 2 * entries, waits=2 * tensors)


def sparse_adamw(entries: int, element: int, *, dense: bool) -> Work:
    """Per entry an index (4 bytes), two moments read and written (16), the weight's sector twice.

    The gradient is another sector (dense) or 4 bytes (compact); 16-bit weights have fp32 values of
    8 bytes, read and written. Two launches: the step, and the step counts.
    """
    streamed = 4 + 16 + (0 if dense else 4) + (8 if element == 2 else 0)
    return Work(2, 1, streamed * entries, (3 if dense else 2) * entries, waits=3)


def fused_adamw(numel: int, tensors: int, element: int) -> Work:
    """Weight and both moments read and written, gradient read: 7 * element bytes per weight.

    torch launches at the latest after 36 tensors or 320 pieces of 65,536 elements, and increments
    110 step counts at a time.
    """
    pieces = math.ceil(numel / 65536)
    launches = math.ceil(tensors / 36) + math.ceil(pieces / 320) + math.ceil(tensors / 110)
    return Work(launches, 2, 7 * element * numel, waits=launches)


def pack_columns(tokens: int, used: float, width: int, element: int, gpu: Gpu) -> Work:
    """Read the sectors of x that hold a used column, write these: tokens * used * element bytes."""
    read = sectors_per_token(width, used, element, gpu) * gpu.sector
    return Work(1, 1, tokens * (read + used * element))


def sampled_grad(
    tokens: int, entries: int, rows: float, columns: float, element: int, gpu: Gpu
) -> Work:
    """Read the packed columns, and the sectors of dy that hold a used row.

    2 * tokens * entries FLOP. An entry's column and result are 8 bytes, a row and its offset 8. Two
    launches: sums over parts of the tokens, and their sum.
    """
    dy = sectors_per_token(HEIGHT, rows, element, gpu) * gpu.sector
    streamed = tokens * (columns * element + dy) + 8 * entries + 8 * rows
    return Work(2, 1, streamed, flops=2 * tokens * entries, waits=3)


def dense_gradient(tokens: int, height: int, width: int, element: int) -> Work:
    """``dy.T @ x``: 2 * tokens * height * width FLOP, on matrix units in bf16, not in fp32."""
    streamed = element * (tokens * (height + width) + height * width)
    matrix = element == 2
    return Work(1, 1, streamed, flops=2 * tokens * height * width, matrix=matrix, waits=1)


def sampled_embedding_grad(tokens: int, entries: int, vocabulary: int) -> Work:
    """Find the tokens' rows (8 bytes and 4), sort them with their order (48), and add up.

    An entry's row, column and result are 12 bytes; for every pair of an entry and a token of its
    row a sector of dy and the token's number (8). Two launches and those of torch's sort, about
    eight.
    """
    pairs = entries * tokens / vocabulary
    return Work(10, 1, (8 + 4 + 48) * tokens + 12 * entries + 8 * pairs, pairs, waits=10)


def dense_embedding_grad(tokens: int, vocabulary: int, width: int) -> Work:
    """Write vocabulary * width zeros in fp32, then sort the tokens and add up their gradients."""
    streamed = 4 * vocabulary * width + 3 * 4 * tokens * width
    return Work(8, 1, streamed, waits=8)


@dataclass(frozen=True)
class Operation:
    """A line of the table.

    Attributes:
        name: the same as in measurements.
        work: what it asks of a GPU.
        baseline: the operation it is compared with.
    """

    name: str
    work: Callable[[Gpu], Work]
    baseline: str | None = None


TOPK = "torch.topk on the concatenation"
WITH_CONCATENATION = "torch.cat, abs_, torch.topk, by parameter"


def _same_everywhere(work: Work) -> Callable[[Gpu], Work]:
    return lambda gpu: work


def _selection() -> Iterable[Operation]:
    for dtype, element in ELEMENT.items():
        plain = f"acc.add_(grad), {dtype} gradients"
        fused = accumulate_topk(ENTRIES, NUMEL, TENSORS, LARGE_TENSORS, element)
        name = f"accumulate_topk, {dtype} gradients"
        yield Operation(name, _same_everywhere(fused), plain)
        yield Operation(plain, _same_everywhere(add(NUMEL, TENSORS, element)))
    yield Operation("finish", _same_everywhere(finish(ENTRIES)))
    whole = offer(ENTRIES, NUMEL, TENSORS, LARGE_TENSORS) + finish(ENTRIES)
    name = "selection from sums, finish included"
    yield Operation(name, _same_everywhere(whole), WITH_CONCATENATION)
    yield Operation(TOPK, _same_everywhere(torch_topk(NUMEL)))
    plain_whole = concatenation(NUMEL) + torch_topk(NUMEL) + by_parameter(ENTRIES)
    yield Operation(WITH_CONCATENATION, _same_everywhere(plain_whole))


def _steps() -> Iterable[Operation]:
    gather = streamed_gather(ENTRIES, TENSORS, 4)
    yield Operation("gather, streamed, fp32", _same_everywhere(gather))
    yield Operation("scatter_, fp32", _same_everywhere(scatter(ENTRIES, TENSORS, 4)))
    for dtype, element in ELEMENT.items():
        full = f"torch.optim.AdamW(fused=True), {dtype}"
        for source in ("compact", "dense"):
            work = sparse_adamw(ENTRIES, element, dense=source == "dense")
            name = f"sparse_adamw_, {source} gradients, {dtype}"
            yield Operation(name, _same_everywhere(work), full)
        yield Operation(full, _same_everywhere(fused_adamw(NUMEL, TENSORS, element)))


def _weight_gradients() -> Iterable[Operation]:
    for tokens in TOKENS:
        for dtype, element in ELEMENT.items():
            size = f"{tokens:,} tokens, {dtype}"
            dense = f"dense product, {size}"
            for kind in ("uniform", "concentrated"):
                yield from _sampled(kind, tokens, element, size, dense)
            work = dense_gradient(tokens, HEIGHT, WIDTH, element)
            yield Operation(dense, _same_everywhere(work))


def _sampled(kind: str, tokens: int, element: int, size: str, dense: str) -> Iterable[Operation]:
    rows, columns = used_rows_and_columns(kind)
    entries = int(DENSITY * HEIGHT * WIDTH)
    yield Operation(
        f"sampled_grad, {kind} mask, {size}",
        lambda gpu: sampled_grad(tokens, entries, rows, columns, element, gpu),
        dense,
    )
    yield Operation(
        f"pack_columns, {kind} mask, {size}",
        lambda gpu: pack_columns(tokens, columns, WIDTH, element, gpu),
    )


def _embedding() -> Iterable[Operation]:
    entries = int(DENSITY * VOCABULARY * EMBEDDING)
    sampled = sampled_embedding_grad(PROMPT_TOKENS, entries, VOCABULARY)
    dense = dense_embedding_grad(PROMPT_TOKENS, VOCABULARY, EMBEDDING)
    baseline = "embedding_dense_backward, fp32"
    yield Operation("sampled_embedding_grad, fp32", _same_everywhere(sampled), baseline)
    yield Operation(baseline, _same_everywhere(dense))


#: By name, in the order of the data path.
OPERATIONS: Mapping[str, Operation] = {
    operation.name: operation
    for group in (_selection(), _steps(), _weight_gradients(), _embedding())
    for operation in group
}


# Measurements -------------------------------------------------------------------------------------

_WITH_BACKEND = re.compile(r"(.+) \((\w+)\)")


def measured_gpu(result: Mapping[str, Any]) -> Gpu:
    """The GPU that a result was measured on.

    Raises:
        ResultError: if there is no prediction for it, or for what was measured.
    """
    setting = result["setting"]
    if (setting["model"], setting["density"]) != (MODEL, DENSITY):
        raise result_file.ResultError(
            f"the model is of {MODEL} at density {DENSITY:g}, and this result is of "
            f"{setting['model']} at {setting['density']:g}; measure without --model and --smoke"
        )
    name = str(result["environment"].get("gpu", "no GPU"))
    for gpu in GPUS:
        if gpu.known_as in name:
            return gpu
    raise result_file.ResultError(
        f"the model knows no {name}; it knows {', '.join(gpu.known_as for gpu in GPUS)}"
    )


def measured_times(result: Mapping[str, Any]) -> list[tuple[Operation, str, Timing]]:
    """(operation, backend or nothing, its timing) of all that the model knows."""
    found = []
    for case in result["cases"].values():
        for timing in outcome_of(case).timings:
            name, backend = timing.name, ""
            if (match := _WITH_BACKEND.fullmatch(name)) and match[1] in OPERATIONS:
                name, backend = match[1], match[2]
            if name in OPERATIONS:
                found.append((OPERATIONS[name], backend, timing))
    return found


# Tables -------------------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any] | None = None) -> str:
    """The model's figures, beside measured ones if there is a result.

    Args:
        result: of ``python -m bench gpu``.
    """
    parts = [_INTRODUCTION, _times_table(), "Against the baselines, by the model:", _ratio_table()]
    if result is not None:
        gpu = measured_gpu(result)
        parts += [_measured_title(result, gpu), _measured_table(result, gpu)]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = (
    "Figures of a model, not measurements. "
    f"CLIP {MODEL}: {NUMEL:,} parameters in {TENSORS} tensors, {ENTRIES:,} of them selected, "
    f"uniformly; a layer of {HEIGHT} x {WIDTH}; a token embedding of {VOCABULARY:,} x {EMBEDDING}. "
    f"The model takes {1e6 * LAUNCH:g} µs per launch, {1e6 * LATENCY:g} µs per access to memory "
    "that waits for another (a third of it where the second level cache answers), "
    f"{STREAMED:.0%} of the datasheet's bandwidth for what is read and "
    f"written in order, {SCATTERED:.0%} for sectors that lie apart ({GPUS[0].sector} bytes, "
    f"{GPUS[-1].sector} on an {GPUS[-1].name}), {MATRIX:.0%} of the datasheet's rate for "
    f"products on matrix units and {PLAIN:.0%} without them, and "
    f"{1e6 * CALL:g} µs of the host for every operation that Python calls. "
    "Where the host takes longer than the GPU, its time is what a loop in Python takes; a CUDA "
    "graph does without it."
)


def _times_table() -> str:
    gpu = GPUS[1]
    header = [
        "operation", "launches", f"bytes, {gpu.name} (model)", "FLOP (model)",
        *(f"{gpu.name} (model)" for gpu in GPUS), "host (model)",
    ]  # fmt: skip
    rows = []
    for operation in OPERATIONS.values():
        work = operation.work(gpu)
        times = [format_seconds(operation.work(each).seconds_on(each)) for each in GPUS]
        rows.append(
            [
                operation.name,
                f"{work.launches:,}",
                _engineering(work.bytes_on(gpu), "B"),
                _engineering(work.flops, "FLOP") if work.flops else "",
                *times,
                format_seconds(work.host_seconds),
            ]
        )
    return table(header, rows)


def _ratio_table() -> str:
    header = ["operation", "baseline", *(f"times faster, {gpu.name} (model)" for gpu in GPUS)]
    rows = [
        [operation.name, operation.baseline, *(f"{speed_up(operation, gpu):.3g}" for gpu in GPUS)]
        for operation in OPERATIONS.values()
        if operation.baseline is not None
    ]
    return table(header, rows)


def speed_up(operation: Operation, gpu: Gpu) -> float:
    """How many times faster the model finds an operation than its baseline, on the GPU alone."""
    assert operation.baseline is not None
    baseline = OPERATIONS[operation.baseline].work(gpu).seconds_on(gpu)
    return baseline / operation.work(gpu).seconds_on(gpu)


def _measured_title(result: Mapping[str, Any], gpu: Gpu) -> str:
    where = result["environment"]
    return f"Measured on {where['gpu']} ({where['date'][:10]}), beside the model of the {gpu.name}:"


def _measured_table(result: Mapping[str, Any], gpu: Gpu) -> str:
    header = ["operation", "backend", f"{gpu.name} (model)", "measured", "measured over model"]
    rows = []
    for operation, backend, timing in measured_times(result):
        predicted = operation.work(gpu).seconds_on(gpu)
        rows.append(
            [
                operation.name,
                backend or "torch",
                format_seconds(predicted),
                format_seconds(timing.median),
                f"{timing.median / predicted:.2f}",
            ]
        )
    return table(header, rows)


def _engineering(number: float, unit: str) -> str:
    """Three digits with a power of a thousand."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


# Command line -------------------------------------------------------------------------------------

#: Of the block that ``--update`` rewrites.
MARKERS = ("<!-- roofline:begin -->", "<!-- roofline:end -->")


def command(
    measured: Annotated[
        Path | None, typer.Option(help="A result of `python -m bench gpu` to put beside it.")
    ] = None,
    update: Annotated[
        Path | None,
        typer.Option(help="Rewrite the block between the markers of this Markdown file."),
    ] = None,
) -> None:
    """Print what a model predicts for GPUs, as Markdown."""
    text = markdown(None if measured is None else result_file.read_result(measured))
    if update is None:
        print(text, end="")
    else:
        result_file.update_block(update, text, MARKERS)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; an error is one sentence."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app(arguments)
    except SaftError as error:
        say(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()

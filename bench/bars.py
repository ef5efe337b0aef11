"""The bars that figures are held to, by name; ``python -m bench check`` goes through them all.

They were set before the work, from prototypes, for CLIP ViT-B/16 with 0.1% of its parameters
selected. ``foundation`` are those of selection, optimizer step, streamed gradients and deltas;
``sampled`` those of sampled gradients and of the text tower without padding; ``reliability`` those
of the delta's format.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from .outcome import Figure


@dataclass(frozen=True)
class Bar:
    """What a figure must reach.

    Attributes:
        name: on the command line and in results.
        case: that measures it.
        limit: what the figure must reach.
        at_least: it is a lower bound; otherwise an upper one.
        origin: the set of bars that it belongs to.
    """

    name: str
    case: str
    limit: float
    at_least: bool = False
    origin: str = "foundation"


def _foundation() -> Iterable[Bar]:
    for data in ("gradients", "normal-numbers"):
        yield Bar(f"selection/{data}", "accumulate_topk", 30, at_least=True)
        yield Bar(f"accumulation/{data}", "accumulate_topk", 1.3)
    yield Bar("accumulation/memory", "accumulate_topk", 1.0)
    speeds = (30, 60, 50, 100)
    for (source, mask), speed in zip(
        product(("dense", "compact"), ("uniform", "selected")), speeds, strict=True
    ):
        yield Bar(f"adamw/{source}/{mask}", "sparse_adamw", speed, at_least=True)
    yield Bar("adamw/state", "sparse_adamw", 20)
    yield Bar("adamw/growth/nnz", "sparse_adamw", 1.1)
    yield Bar("adamw/growth/D", "sparse_adamw", 0.1)
    yield Bar("delta/size", "delta", 0.25)
    for mask in ("uniform", "selected"):
        yield Bar(f"streamed/{mask}/time", "clip_step", 1.0)
        yield Bar(f"streamed/{mask}/memory", "clip_step", 7.5, at_least=True)


#: Largest time of a step with sampled gradients over that of others, by precision.
_SAMPLED_STEP = {
    "fp32": {"floor": 1.05, "full": 0.66, "index-and-hook": 1.0, "lora": 1.0},
    "amp_bf16": {"floor": 1.06, "full": 0.72, "index-and-hook": 1.0, "lora": 1.0},
}


def _sampled() -> Iterable[Bar]:
    for dtype, speed in (("float32", 12), ("bfloat16", 7)):
        for mask in ("uniform", "concentrated"):
            yield Bar(f"sampled/{dtype}/{mask}", "sampled_grad", speed, True, "sampled")
    yield Bar("sampled/growth/entries", "sampled_grad", 1.1, origin="sampled")
    yield Bar("sampled/growth/tokens", "sampled_grad", 1.1, origin="sampled")
    yield Bar("sampled/choice", "sampled_grad", 6, True, "sampled")
    yield Bar("prompts/packed", "encode_prompts", 12, True, "sampled")
    for precision, others in _SAMPLED_STEP.items():
        for mask in ("uniform", "concentrated", "selected"):
            for other, limit in others.items():
                name = f"step/{precision}/{mask}/{other}"
                yield Bar(name, "clip_step", limit, origin="sampled")
    for mask in ("concentrated", "selected"):
        yield Bar(f"step/memory/{mask}", "clip_step", 6, origin="sampled")
    for mask in ("uniform", "selected"):
        yield Bar(f"prompt-step/{mask}", "prompt_step", 4, True, "sampled")


def _reliability() -> Iterable[Bar]:
    yield Bar("delta/entry/float32", "delta", 6.1, origin="reliability")
    yield Bar("delta/entry/bfloat16", "delta", 4.1, origin="reliability")
    yield Bar("delta/decoding", "delta", 200, True, "reliability")


BARS = {bar.name: bar for bar in (*_foundation(), *_sampled(), *_reliability())}

#: The bars that say most, in the order of the README: one of each kind, the least kind mask.
HEADLINES = (
    "step/fp32/uniform/full",
    "step/fp32/uniform/floor",
    "step/fp32/uniform/lora",
    "step/amp_bf16/uniform/full",
    "streamed/uniform/time",
    "prompt-step/uniform",
    "prompts/packed",
    "selection/gradients",
    "adamw/dense/uniform",
    "sampled/float32/uniform",
    "streamed/uniform/memory",
    "step/memory/concentrated",
    "adamw/state",
    "delta/size",
)


def held_to(name: str, figure: Figure) -> Figure:
    """The figure, with the bar of this name."""
    bar = BARS[name]
    return replace(figure, bar=bar.limit, at_least=bar.at_least, check=name)


def without_bar(figure: Figure) -> Figure:
    """The figure as it is reported of other models, densities and dtypes than the bars are for."""
    return replace(figure, bar=None, check="")

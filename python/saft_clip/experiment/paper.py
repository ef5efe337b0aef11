"""What papers report, to show beside what was measured; never mixed with it.

All are of CLIP ViT-B/16 with OpenAI's weights and 16 images per class.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """A line of a published table, in percent.

    Attributes:
        method: as the paper calls it.
        values: what the columns of that protocol's means are called -> value.
        source: paper and table.
    """

    method: str
    values: dict[str, float]
    source: str


_SAFT = "SAFT, arXiv 2407.03036"
_MAPLE = "Khattak et al. 2023, CVPR"


def _base_to_new(method: str, base: float, new: float, mean: float, source: str) -> PaperRow:
    return PaperRow(method, {"base": base, "new": new, "harmonic mean": mean}, source)


#: Protocol -> what is compared, and the rows.
PAPER: dict[str, tuple[str, list[PaperRow]]] = {
    "shift": (
        "ImageNet, and the mean of its variants (V2, Sketch, A, R)",
        [PaperRow("SAFT minus full fine-tuning", {"mean of shifted": 5.15}, f"{_SAFT}, abstract")],
    ),
    "base-to-new": (
        "the mean of CoOp's eleven data sets",
        [
            _base_to_new("CLIP", 69.34, 74.22, 71.70, f"{_SAFT}, Table 2"),
            _base_to_new("CoOp", 82.69, 63.22, 71.66, f"{_MAPLE}, Table 3"),
            _base_to_new("CoCoOp", 80.47, 71.69, 75.83, f"{_MAPLE}, Table 3"),
            _base_to_new("MaPLe", 82.28, 75.14, 78.55, f"{_MAPLE}, Table 3"),
            _base_to_new("SAFT", 83.97, 74.78, 79.11, f"{_SAFT}, Table 2"),
        ],
    ),
    "cross-dataset": (
        "from ImageNet to the mean of CoOp's ten other data sets",
        [
            PaperRow("CoOp", {"mean of targets": 63.88}, f"{_MAPLE}, Table 4"),
            PaperRow("CoCoOp", {"mean of targets": 65.74}, f"{_MAPLE}, Table 4"),
            PaperRow("MaPLe", {"mean of targets": 66.30}, f"{_MAPLE}, Table 4"),
            PaperRow("SAFT", {"mean of targets": 66.67}, f"{_SAFT}, Table 3"),
        ],
    ),
}

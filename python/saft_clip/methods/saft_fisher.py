"""SAFT†: the entries with the largest Fisher information."""

from __future__ import annotations

from saft_clip.methods.saft import Saft


class SaftFisher(Saft):
    """Entries are ranked by the mean over the images of the squared gradient of their own loss.

    That is the diagonal of the empirical Fisher information (SAFT, Eq. 7; the FISH mask of Sung et
    al. 2021). Selection goes backward once for each image, training is SAFT's.
    """

    name = "saft-fisher"
    score = "fisher"
    takes_mask = False

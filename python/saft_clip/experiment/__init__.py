"""Experiments: methods on data sets, over seeds and shots, and what comes out of them.

A :class:`~saft_clip.experiment.plan.Plan` says what is compared; a protocol
(:mod:`~saft_clip.experiment.protocols`) what is trained on and evaluated on; each run is a cell
(:mod:`~saft_clip.experiment.cells`), an ordinary ``saft finetune`` in a folder of its own;
:mod:`~saft_clip.experiment.runner` runs what is not there yet; and
:mod:`~saft_clip.experiment.record` reads what all of them found.
"""

"""`auto`: one of five methods for each tensor. The rule is in `cfmerge/diagnosis/choice.py`."""

import dataclasses

from cfmerge.core.part import Method
from cfmerge.core.registry import register
from cfmerge.methods.spectral import svc
from cfmerge.methods.tsv import tsv_m


@register
def auto() -> Method:
    """For each tensor one of five methods, by its kind and by what its deltas are like; the notes say which and why.

    Convolutions get `power >> half_flatten`, deltas of low rank `opcm`, deltas whose least-squares merge would
    outgrow them `dc_merge`, unchanged tensors `average`, all others `tsv_m >> svc(alpha=1)`. The models are read once
    more, to see what the deltas are like.

    Source: cfmerge; the rule and what is known of it are in docs/auto.md.
    """
    full: Method = tsv_m() >> svc(alpha=1)
    needs = full.needs.but(weights="positive")
    return dataclasses.replace(full, needs=needs, chooses=True, joint=False, form=None, survey=None)

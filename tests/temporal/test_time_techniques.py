"""Every registered method as a technique: a store gives what the rule gives in memory, or both refuse it by name."""

import re

import numpy as np
import pytest
from every_part import PARTS, text_of
from toys import small

import cfmerge
from cfmerge import temporal
from cfmerge.temporal.rules import interpolates

BASE, SHARED = small(), small(9)
TREES = [  # they have something in common: model_stock leaves deltas that point apart at the base
    {name: array + SHARED[name] - BASE[name] for name, array in small(number).items()} for number in range(1, 5)
]
SOME = ("average", "ace", "ties", "opcm", "slerp", "dare_ties", "regmean", "trim >> average")


def checked(part, name, path):
    more = {"average": ", weight=0.4", "linear": ", weight=0.4", "model_stock": ", seed='first'"}.get(part, "")
    rule = f"{name}(technique={text_of(part)!r}{more if name == 'ema' else ''})"
    tasks = {f"t{n}": tree for n, tree in enumerate(TREES, 1)}
    try:
        expected = [temporal.combined(rule, BASE, dict(list(tasks.items())[:count])) for count in (2, 4)]
    except cfmerge.CfmergeError as error:
        with pytest.raises(cfmerge.CfmergeError, match=re.escape(str(error))):
            temporal.Time(path, BASE, init="base", deploy=rule)
        return
    time = temporal.Time(path, BASE, init="base", deploy=rule)
    for number, (task, tree) in enumerate(tasks.items(), 1):
        time.store(tree, task)
        if number in {2, 4}:
            got = time.deploy(like=BASE)
            for key, array in expected[number // 2 - 1].items():
                np.testing.assert_allclose(got[key], array, atol=1e-5, err_msg=rule)


@pytest.mark.parametrize("part", SOME)
@pytest.mark.parametrize("name", ["ema", "all"])
def test_some_techniques(part, name, tmp_path):
    checked(part, name, tmp_path / "store")


@pytest.mark.long
@pytest.mark.parametrize("part", [part for part in PARTS if part not in SOME])
@pytest.mark.parametrize("name", ["ema", "all"])
def test_every_technique(part, name, tmp_path):
    checked(part, name, tmp_path / "store")


def test_interpolation_is_the_mean_by_weights_alone():
    by_text = {
        text: interpolates(cfmerge.methods.make(text)) for text in ("average", "linear", "ties", "star >> average")
    }
    assert by_text == {"average": True, "linear": True, "ties": False, "star >> average": False}

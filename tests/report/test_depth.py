"""Numbers gathered layer by layer are those of the layer's tensors as one vector."""

import numpy as np
import pytest
from report_parts import measured, tensors

from cfmerge.report.page import depth

RANDOM = np.random.default_rng(3)
SHAPES = ((3, 5), (4, 4))
BASES = [RANDOM.standard_normal(shape) for shape in SHAPES]
DELTAS = [RANDOM.standard_normal((3, *shape)) for shape in SHAPES]  # the last is the merged one
MEMBERS = [measured(base, list(deltas)) for base, deltas in zip(BASES, DELTAS, strict=True)]
WHOLE = np.concatenate([deltas.reshape(3, -1) for deltas in DELTAS], axis=1)


def test_relative_norms_and_cosines_are_of_all_entries():
    base = np.concatenate([one.ravel() for one in BASES])
    norms = np.linalg.norm(WHOLE, axis=1)
    np.testing.assert_allclose(depth.relative_norms(MEMBERS), norms / np.linalg.norm(base))
    np.testing.assert_allclose(depth.cosines(MEMBERS), WHOLE @ WHOLE.T / np.outer(norms, norms))


def test_what_an_expert_kept_is_the_merged_delta_along_its_own():
    expected = [WHOLE[2] @ WHOLE[t] / (WHOLE[t] @ WHOLE[t]) for t in (0, 1)]
    np.testing.assert_allclose(depth.kept(MEMBERS), expected)


def test_the_average_of_unrelated_experts_keeps_a_share_of_each():
    first, second = np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])
    np.testing.assert_allclose(depth.kept([measured(first, [first, second, (first + second) / 2])]), [0.5, 0.5])


def test_conflicts_are_weighted_by_size():
    signs = np.sign(WHOLE)
    expected = np.mean(signs[0] != signs[1])
    assert depth.conflicts(MEMBERS)[0, 1] == pytest.approx(expected)
    assert depth.with_others(np.array([[0.0, 0.2, 0.4], [0.2, 0, 0], [0.4, 0, 0]]))[0] == pytest.approx(0.3)


def test_an_expert_that_changed_nothing_has_no_cosine():
    one = measured(np.ones((2, 2)), [np.zeros((2, 2)), np.ones((2, 2))])
    assert np.isnan(depth.cosines([one])[0]).all()
    assert np.isnan(depth.kept([one])).all()


def test_runs_are_told_apart_by_the_beginning_of_their_names():
    found = tensors(2)
    found |= {name.replace("model.", "vision."): one for name, one in tensors(4).items()}
    made = depth.runs(found)
    assert [(run.title, run.numbers) for run in made] == [("model.layers", [0, 1]), ("vision.layers", [0, 1, 2, 3])]
    assert len(made[0].places[0][1]) == 3
    assert [run.title for run in depth.runs(found, most=1)] == ["vision.layers"]


def test_a_model_without_layers_is_one_run_of_its_tensors():
    (run,) = depth.runs({"conv.weight": MEMBERS[0], "dense.weight": MEMBERS[1]})
    assert (run.axis, run.places) == ("tensor", ((0, ("conv.weight",)), (1, ("dense.weight",))))


def test_typical_matrices_are_of_the_first_middle_and_last_layer():
    found = tensors(5)
    names = depth.typical(found, depth.runs(found)[0], most=1)
    assert [found[name].layer for name in names] == [0, 2, 4]
    assert len({name.partition(".layers.")[2][2:] for name in names}) == 1

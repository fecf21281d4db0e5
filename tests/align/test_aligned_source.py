"""A model on disk that is read in the order of another."""

import numpy as np
import pytest

from cfmerge.align import parse_spaces, permute, random_permutations
from cfmerge.align.source import Aligned, Alignment, Found, check_same_sizes
from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.formats.named import Chosen, Tensors

TABLE = {"up": "hidden, in -", "bias": "hidden", "down": "-, in hidden", "conv": "hidden, in -, -", "step": ""}
SHAPES = {"up": (6, 4), "bias": (6,), "down": (3, 6), "conv": (6, 2, 5), "step": ()}


@pytest.fixture
def spaces():
    return parse_spaces(TABLE, SHAPES)


@pytest.fixture
def model(make_model, tmp_path):
    generator = np.random.default_rng(0)
    tensors = {name: np.asarray(generator.normal(size=shape), np.float32) for name, shape in SHAPES.items()}
    make_model(tmp_path / "model", tensors, config={})
    return tensors, open_checkpoint(tmp_path / "model")


def aligned(source, spaces, permutations, calls=None):
    def find():
        if calls is not None:
            calls.append(1)
        return Found({"math": permutations}, ("told",))

    return Aligned(source, Alignment(spaces, find, "by hand"), "math", spaces)


def test_tensors_are_read_in_the_other_order_as_a_whole_and_in_pieces(model, spaces):
    tensors, source = model
    permutations = random_permutations(spaces, 1)
    seen = aligned(source, spaces, permutations)
    expected = permute(spaces, tensors, permutations)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(seen.read(name), tensor)
        assert seen.read(name).dtype == np.float32
        for first in range(tensor.size):
            for count in (1, 5, tensor.size - first):
                if first + count <= tensor.size:
                    piece = seen.read(name, first, count)
                    np.testing.assert_array_equal(piece, tensor.reshape(-1)[first : first + count])
    np.testing.assert_array_equal(seen.delta("down").tensor, expected["down"])
    assert seen.rank("down") is None


def test_the_permutations_are_found_once_and_not_by_headers(model, spaces):
    calls = []
    seen = aligned(model[1], spaces, random_permutations(spaces, 1), calls)
    assert (seen.tensors["up"].shape, seen.read("step").shape, calls) == ((6, 4), (), [])
    seen.prepare()
    seen.read("up")
    assert calls == [1]


def test_another_process_recalls_what_one_has_found(model, spaces):
    first = aligned(model[1], spaces, random_permutations(spaces, 1))
    calls = []
    other = aligned(model[1], spaces, None, calls)
    other.alignment.recall(first.alignment.as_plain())
    np.testing.assert_array_equal(other.read("up"), first.read("up"))
    assert (calls, other.alignment.found().told) == ([], ("told",))
    with pytest.raises(CfmergeError, match="space 'hidden': expected each of"):
        other.alignment.recall({"permutations": {"math": {"hidden": [0, 0]}}, "told": []})


def test_tensors_by_other_names_are_read_when_they_are_asked_for(model):
    tensors, source = model
    lazy = Chosen(Tensors(source), {"fc.weight": "up"})
    assert (list(lazy), len(lazy)) == (["fc.weight"], 1)
    np.testing.assert_array_equal(lazy["fc.weight"], tensors["up"])


def test_models_of_other_widths_are_refused(spaces):
    wider = parse_spaces(TABLE, {**SHAPES, "up": (7, 4), "bias": (7,), "down": (3, 7), "conv": (7, 2, 5)})
    with pytest.raises(CfmergeError, match="expert 'math' has 7 elements in the space 'hidden', base has 6"):
        check_same_sizes("base", spaces, "expert 'math'", wider)

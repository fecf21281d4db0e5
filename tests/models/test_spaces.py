"""Permutation spaces: tables of axes, checked against shapes."""

import pytest

from cfmerge.errors import CfmergeError
from cfmerge.models.spaces import Use, parse_spaces

MLP = {"fc1.weight": "hidden, in -", "fc1.bias": "hidden", "fc2.weight": "-, in hidden"}
SHAPES = {"fc1.weight": (8, 3), "fc1.bias": (8,), "fc2.weight": (2, 8)}


def test_a_space_is_where_the_table_names_it():
    spaces = parse_spaces(MLP, SHAPES)
    assert spaces.sizes == {"hidden": 8}
    assert spaces.uses("hidden") == (Use("fc1.weight", 0), Use("fc1.bias", 0), Use("fc2.weight", 1))
    assert [axis.reads for axis in spaces.axes["fc2.weight"]] == [False, True]


def test_a_table_as_text_is_read_again():
    table = {"q": "kv kv.q 4, in h", "v": "kv kv.v, in h", "o": "h, in kv kv.q kv.v", "k": "kv 4 + 3, in -"}
    shapes = {"q": (24, 10), "v": (8, 10), "o": (10, 24), "k": (11, 5)}
    spaces = parse_spaces(table, shapes)
    assert spaces.sizes == {"kv": 2, "h": 10, "kv.q": 3, "kv.v": 4}
    assert parse_spaces(spaces.table(), shapes) == spaces


def test_sizes_follow_from_the_shapes_or_are_given():
    table = {"conv": "c, -, -, -", "fc": "hidden, in c -", "out": "-, in hidden"}
    spaces = parse_spaces(table, {"conv": (6, 3, 3, 3), "fc": (5, 24), "out": (2, 5)})
    assert spaces.sizes == {"c": 6, "hidden": 5}
    heads = {"v": "heads heads.v, in -", "o": "-, in heads heads.v"}
    shapes = {"v": (12, 5), "o": (5, 12)}
    assert parse_spaces(heads, shapes, {"heads": 3}).sizes == {"heads": 3, "heads.v": 4}
    with pytest.raises(CfmergeError, match=r"tensor 'v': axis 0.*'heads' and 'heads.v' do not follow"):
        parse_spaces(heads, shapes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hidden", r"tensor 'fc2.weight': 'hidden' has 1 axes, the tensor the shape \(2, 8\)"),
        ("hidden, in -", r"tensor 'fc2.weight': axis 0 has 2 elements, and the table 'hidden' where hidden=8"),
        ("-, in 3 hidden", "axis 1 has 8 elements, and the table 'in 3 hidden' where hidden=8"),
        ("-, in in hidden", "'in in hidden' is no axis"),
        ("-, in hidden +", r"'in hidden \+' is no axis"),
        ("-, in other", "'other' is on one axis alone, of tensor 'fc2.weight'"),
        ("-, in hidden.v", "'hidden.v' permutes within the elements of 'hidden', which must stand in front"),
    ],
)
def test_a_wrong_line_is_an_error_that_names_the_tensor(line, message):
    with pytest.raises(CfmergeError, match=message):
        parse_spaces({**MLP, "fc2.weight": line}, SHAPES)


def test_every_tensor_has_a_line_and_every_line_a_tensor():
    with pytest.raises(CfmergeError, match=r"no line for tensor norm\.scale; one that does not permute"):
        parse_spaces(MLP, {**SHAPES, "norm.scale": (8,)})
    with pytest.raises(CfmergeError, match=r"the model has no tensor fc3\.bias"):
        parse_spaces({**MLP, "fc3.bias": "-"}, SHAPES)

"""The comparison with other packages, as far as it runs without their environments: a stand-in merges for them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console

import cfmerge
import peers
from cfmerge import CfmergeError, methods
from cfmerge_accuracy.zoo import Zoo
from peers_cases import CASES, Case, without_options
from peers_merging import Files, Worker, canonical, merged_by, ours, stored

pytestmark = pytest.mark.filterwarnings("ignore:.*averaged, not solved")
TASKS = ("a", "b", "c")


def small_zoo(dim=12, layers=2, seed=0):
    """Deltas of falling spectrum about a random base; a task's logits are linear in its inputs."""
    rng = np.random.default_rng(seed)
    shapes = {"position": (5, dim), "norm/scale": (dim,)}
    for layer in range(layers):
        shapes |= {f"block_{layer}/in/kernel": (dim, 2 * dim), f"block_{layer}/out/kernel": (2 * dim, dim)}
        shapes |= {f"block_{layer}/in/bias": (2 * dim,), f"block_{layer}/out/bias": (dim,)}
    base = {name: 0.1 * rng.standard_normal(shape) for name, shape in shapes.items()}
    inputs = {task: rng.standard_normal((200, dim)) * np.exp(rng.standard_normal(dim)) for task in TASKS}

    def noise(shape):
        scale = np.exp(-0.5 * np.arange(shape[-1]))
        return 0.01 * rng.standard_normal(shape) * scale + 1e-3 * rng.standard_normal(shape)

    def tree(flat):
        return unflatten_dict({name: np.asarray(value, np.float32) for name, value in flat.items()}, sep="/")

    experts = {task: tree({name: value + noise(value.shape) for name, value in base.items()}) for task in TASKS}

    def hidden(params, x):
        for layer in range(layers):
            block = params[f"block_{layer}"]
            x = x + np.tanh(x @ block["in"]["kernel"] + block["in"]["bias"]) @ block["out"]["kernel"]
        return x

    def grams(task):
        wide = np.repeat(inputs[task], 2, axis=1)
        gram, other = inputs[task].T @ inputs[task] / 200, wide.T @ (wide * (1 + np.arange(2 * dim))) / 200
        return {
            f"block_{layer}/{part}/kernel": np.asarray(value, np.float32)
            for layer in range(layers)
            for part, value in (("in", gram), ("out", (other + other.T) / 2 + np.eye(2 * dim)))
        }

    def fishers(task):
        return tree({name: 1e-3 * rng.standard_normal(shape) ** 2 for name, shape in shapes.items()})

    def labels(task, split):
        return np.argmax(hidden(experts[task], inputs[task]), axis=-1)

    return Zoo(
        "vision", seed, TASKS, tree(base), experts, tree(base), labels,
        lambda params, task, split: hidden(params, inputs[task]), grams, fishers,
    )  # fmt: skip


class StandIn(Worker):
    """A peer that does what a method of ours does, plus something, or with the experts the other way round."""

    def __init__(self, method, plus=0.0, turned=False):
        self.method, self.plus, self.turned, self.package, self.late = method, plus, turned, "authors", False

    def ask(self, **request):
        return {}

    def merge(self, case, files, names, experts, double):
        few = files.zoo.of_tasks(files.zoo.tasks[:experts][:: -1 if self.turned else 1])
        merged = ours(few, case._replace(method=self.method), files.moments(case, few), True)
        parameters = {name: files.parameters[name] for name in names}
        base, after = (canonical(flatten_dict(tree, sep="/"), parameters) for tree in (few.base, merged))
        return {name: after[name] - base[name] + self.plus for name in names}


@pytest.fixture(scope="module")
def zoo():
    return small_zoo()


@pytest.mark.parametrize("method", ["magmax", "regmean"])
def test_the_same_method_agrees(zoo, method, tmp_path):
    case = Case(method, "authors_it", moments="grams" if method == "regmean" else "none")
    row = peers.compare(case, Files(zoo, tmp_path), StandIn(method))
    assert row["agrees"]
    assert row["difference"] < 1e-3
    assert row["accuracy_ours"] == pytest.approx(row["accuracy_theirs"], abs=0.01)


def test_another_method_does_not_agree(zoo, tmp_path):
    """Which is tried again in float64, and with ties told apart."""
    row = peers.compare(Case("magmax", "authors_it"), Files(zoo, tmp_path), StandIn("average"))
    assert not row["agrees"]
    assert row["tolerance"] == 1e-8
    assert "ties told apart; as they are, in float32" in row["note"]


def test_what_differs_by_ties_alone_agrees(zoo, tmp_path):
    """Of two entries of one size `magmax` takes the first expert's, and the same method the last one's."""
    one = jax.tree.map(lambda expert, base: expert - base, zoo.experts["a"], zoo.base)
    experts = {"a": one, "b": jax.tree.map(np.negative, one)}
    tied = dataclasses.replace(zoo, tasks=("a", "b"), base=jax.tree.map(np.zeros_like, one), experts=experts)
    row = peers.compare(Case("magmax", "authors_it"), Files(tied, tmp_path), StandIn("magmax", turned=True))
    assert row["difference"] < row["tolerance"] == 1e-8
    assert row["note"].startswith("in float64, ties told apart; as they are, in float32, 2e+00, more than 0.001 in")


def test_the_difference_is_relative_to_the_largest_entry(zoo, tmp_path):
    case = Case("average", "authors_it", double=None)
    same = peers.compare(case, Files(zoo, tmp_path), StandIn("average"))
    row = peers.compare(case, Files(zoo, tmp_path), StandIn("average", plus=1e-3))
    merged = cfmerge.merge_params(zoo.base, list(zoo.experts.values()), methods.average())
    start = flatten_dict(zoo.base)
    theirs = [np.asarray(value) - start[name] + 1e-3 for name, value in flatten_dict(merged).items()]
    assert same["difference"] < 1e-5
    assert row["difference"] == pytest.approx(1e-3 / max(np.max(np.abs(each)) for each in theirs), rel=0.01)


def test_tensors_in_the_peers_order_of_axes_and_back(zoo, tmp_path):
    files = Files(zoo, tmp_path)
    leaves = flatten_dict(zoo.base, sep="/")
    with np.load(tmp_path / "base.npz") as file:
        assert file["block_0/in/kernel"].shape == (24, 12)
        for name, parameter in files.parameters.items():
            np.testing.assert_array_equal(stored(file[name], parameter), leaves[name])
    assert set(files.parameters) == set(leaves)
    assert set(merged_by(zoo, "iso_c")) == {name for name in leaves if name.endswith("kernel")}


def chosen(zoo, case):
    return peers.chosen(zoo, case, peers.merged_by(zoo, case.method))


def test_as_many_experts_as_make_it_the_same_method(zoo):
    """DC-Merge of theirs pads where min(out, in) is no multiple of the experts; of 8 and three, two are left."""
    of_twelve, names = chosen(zoo, Case("dc_merge", "authors_dc_merge"))
    of_eight, same_names = chosen(small_zoo(dim=8), Case("dc_merge", "authors_dc_merge"))
    assert of_twelve.tasks == TASKS
    assert of_eight.tasks == TASKS[:2]
    assert names == same_names
    assert len(names) == 4


def test_matrices_on_which_theirs_is_the_same_method(zoo):
    few, names = chosen(zoo, Case("orthomerge", "authors_orthomerge"))
    assert len(few.tasks) == 3
    assert sorted(names) == ["block_0/in/kernel", "block_1/in/kernel"]


def test_without_any_peer_the_way_out_is_told(zoo):
    nothing = peers.Environments(None, None, None, 1.0)
    with pytest.raises(CfmergeError, match=r"PEERS_PYTHON.*fusion-bench.*MERGEKIT_PYTHON.*pip install mergekit"):
        list(peers.run(zoo, CASES, nothing, Console(quiet=True)))


def test_a_peer_that_fails_is_a_row(zoo, tmp_path):
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexit 3\n")
    silent.chmod(0o755)
    cases = [Case("average", "fusion_bench_average"), Case("average", "mergekit_linear")]
    rows = list(peers.run(zoo, cases, peers.Environments(str(silent), None, None, 60.0), Console(quiet=True)))
    assert [row["peer"] for row in rows] == ["fusion_bench_average"]
    assert "ended with 3" in rows[0]["failed"]
    peers.show(rows, "", Console(quiet=True))


def test_rows_are_written_beside_those_that_are_there(tmp_path):
    path = tmp_path / "vision-0.json"
    ours, other = ({"method": method, "function": "x"} for method in "ab")
    path.write_text(json.dumps({"zoo": "vision", "peers": [ours, other]}))
    peers.write(ours | {"difference": 0.1}, path)
    peers.write(other | {"failed": "it"}, path)
    whole = json.loads(path.read_text())
    assert whole == {"zoo": "vision", "peers": [ours | {"difference": 0.1}], "peers_failed": [other | {"failed": "it"}]}


def test_cases_have_methods_that_exist_and_rows_of_the_suite():
    for case in CASES:
        methods.make(case.method)
        assert case.package in ("fusion_bench", "mergekit", "authors")
    names = {case.name for case in CASES}
    assert {"tsv_m", "regmean, paper (a = 0.9)", "task_arithmetic >> svc", "ties", "orthomerge"} <= names
    assert without_options("f(a=g(b=1)) >> h(c=2)") == "f >> h"

"""The protocol, on a zoo of one linear layer whose experts are known."""

import dataclasses
import functools
import json
import os
import re

import numpy as np
import pytest

import cfmerge
from cfmerge import CfmergeError
from cfmerge_accuracy import compare, methods, proxies, suite, workers
from cfmerge_accuracy.methods import Entry
from cfmerge_accuracy.zoo import Zoo

WIDE, CLASSES, EXAMPLES = 12, 4, 40


def small_zoo(tasks=("a", "b", "c")) -> Zoo:
    """Task t reads inputs of its own; its expert classifies them without a fault, the base does not."""
    generator = np.random.default_rng(0)
    base = {"dense": {"kernel": 0.1 * generator.standard_normal((WIDE, CLASSES)).astype(np.float32)}}
    inputs, labels, experts, grams = {}, {}, {}, {}
    for number, task in enumerate(tasks):
        active = np.zeros(WIDE, np.float32)
        active[4 * number : 4 * number + 4] = 1
        delta = (generator.standard_normal((WIDE, CLASSES)) * active[:, None]).astype(np.float32)
        experts[task] = {"dense": {"kernel": base["dense"]["kernel"] + delta}}
        for split in ("train", "validation", "test"):
            x = (generator.standard_normal((EXAMPLES, WIDE)) * active).astype(np.float32)
            inputs[task, split] = x
            labels[task, split] = np.argmax(x @ experts[task]["dense"]["kernel"], axis=-1)
        x = inputs[task, "train"]
        grams[task] = {"dense/kernel": x.T @ x / len(x)}
    return Zoo(
        "toy", 0, tuple(tasks), base, experts, experts[tasks[0]],
        labels=lambda task, split: labels[task, split],
        logits=lambda params, task, split: inputs[task, split] @ np.asarray(params["dense"]["kernel"]),
        grams=lambda task: grams[task],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CFMERGE_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def zoo():
    return small_zoo()


def test_references(zoo):
    found = compare.references(compare.Given(zoo))
    assert found["experts"] == dict.fromkeys(zoo.tasks, 1.0)
    assert np.mean(list(found["base"].values())) < 0.7
    assert found["multitask"]["a"] == 1.0
    assert set(found["ensemble"]) == set(zoo.tasks)
    assert compare.own_accuracies(zoo, "test") == found["experts"]


def test_tasks_on_inputs_of_their_own_are_merged_without_loss_by_the_sum(zoo):
    """Deltas act on disjoint inputs, so their sum is every expert on its own inputs."""
    entry = Entry("sum", "task_arithmetic(scale=1)", "sums")
    row = compare.row(compare.Given(zoo), entry, (0.5,))
    assert row["published"] == dict.fromkeys(zoo.tasks, 1.0)
    assert row["excess"] == pytest.approx(0, abs=1e-6)
    assert row["failed"] is None
    assert row["scaled"] is not None


def test_a_scale_is_chosen_on_validation_and_told_beside_the_default(zoo):
    """The mean is short by the number of experts: 2.83 is the best of the factors, and nothing else changes."""
    entry = Entry("average", "average", "sums")
    row = compare.row(compare.Given(zoo), entry, compare.FACTORS)
    best = max(row["validation"].values())
    assert row["validation"][f"{row['factor']:g}"] == best
    assert np.mean(list(row["scaled"].values())) > np.mean(list(row["published"].values()))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({0.5: 0.9, 0.71: 0.9, 1: 0.9, 2: 0.9}, 1),  # the nearest to 1 wins a tie, and nothing beyond is tried
        ({0.5: 0.9, 0.71: 0.85, 1: 0.8, 2: 0.85, 2.83: 0.9}, 0.5),
        ({0.71: 0.7, 1: 0.8, 2: 0.85, 2.83: 0.8}, 2),
        ({0.5: 0.9, 0.71: 0.7, 1: 0.8, 2: 0.7}, 1),  # behind a valley it does not look
    ],
)
def test_a_factor_is_found_by_climbing(values, found):
    assert compare.climb(values.__getitem__, (0.5, 0.71, 2.0, 2.83)) == found


def test_test_examples_decide_nothing(zoo):
    """Another test split leaves the factor as it was."""

    def wrong(task, split):
        return zoo.labels(task, split) * 0 if split == "test" else zoo.labels(task, split)

    entry = Entry("average", "average", "sums")
    other = dataclasses.replace(zoo, labels=wrong)
    rows = [compare.row(compare.Given(z), entry, compare.FACTORS) for z in (zoo, other)]
    assert rows[0]["factor"] == rows[1]["factor"]
    assert rows[0]["published"] != rows[1]["published"]


def test_running_statistics_are_not_scaled():
    base = {"params": {"w": np.ones(2, np.float32)}, "batch_stats": {"var": np.ones(2, np.float32)}}
    merged = {"params": {"w": np.zeros(2, np.float32)}, "batch_stats": {"var": np.full(2, 0.5, np.float32)}}
    found = compare.scaled(base, merged, 2.0)
    assert found["params"]["w"].tolist() == [-1, -1]
    assert found["batch_stats"]["var"].tolist() == [0.5, 0.5]


def test_an_expert_without_a_right_answer_is_told():
    assert compare.normalised({"a": 0.4, "b": 0.3}, {"a": 0.8, "b": 0.6}) == pytest.approx(0.5)
    with pytest.raises(CfmergeError, match="b: the expert has no right answer"):
        compare.normalised({"a": 0.4, "b": 0.3}, {"a": 0.8, "b": 0.0})


def test_what_fails_is_a_row_and_no_end(zoo):
    rows = compare.compare(zoo, [Entry("fisher", "fisher", "measured", "fishers")], (), lambda line: None)["methods"]
    assert "Fishers are not measured" in rows[0]["failed"]
    assert rows[0]["published"] is None


def test_the_oracle_has_the_least_excess(zoo):
    given = compare.Given(zoo)
    found = {}
    compared = {
        *methods.CURVE, "ace(eps_rel=0.7)", "ace(eps_rel=7)", "actmat", "wudi", "anchored",
        "anchored(ridge=1.5, towards=iso_c)", "iso_cts", "average >> subspace_boosting",
    }  # fmt: skip
    for entry in [entry for entry in methods.entries() if entry.method in compared]:
        merged = compare.merge(zoo, entry, given)
        found[entry.name] = proxies.excess(zoo.base, merged, given.outputs)["dense/kernel"]
    assert min(found, key=found.get) == "regmean, true Grams"
    assert proxies.excess(zoo.base, zoo.base, given.outputs)["dense/kernel"] == pytest.approx(1)
    rows = [delta.astype(np.float64) for delta in proxies.deltas(zoo)["dense/kernel"]]
    grams = [own["dense/kernel"] for own in given.grams().values()]
    x = np.asarray(merged["dense"]["kernel"] - zoo.base["dense"]["kernel"], np.float64).T
    wrong = sum(np.trace((x - d) @ gram @ (x - d).T) for d, gram in zip(rows, grams, strict=True))
    whole = sum(np.trace(d @ gram @ d.T) for d, gram in zip(rows, grams, strict=True))
    assert found[entry.name] == pytest.approx(wrong / whole)


def test_a_curve_counts_experts(zoo):
    average = Entry("average", "average", "sums")
    found = compare.compare(zoo, [average], (), lambda line: None, curve=[average])["counts"]
    assert [row["count"] for row in found] == [2, 3]
    assert found[0]["tasks"] == ["a", "b"]
    assert found[1] == compare.at_count(compare.Given(zoo), [average], 3)[0]


def test_a_model_that_was_judged_is_not_judged_again(zoo):
    """Unless it is another model, other tasks, or judged in another way."""
    asked = []

    def logits(params, task, split):
        asked.append(task)
        return zoo.logits(params, task, split)

    kept = dataclasses.replace(zoo, logits=logits, judged_by="code and examples")
    assert [kept.accuracies(zoo.base, "test") for _ in range(2)] == [zoo.accuracies(zoo.base, "test")] * 2
    assert [kept.ensemble("test") for _ in range(2)] == [zoo.ensemble("test")] * 2
    assert len(asked) == 3 + 9
    for other in (kept, dataclasses.replace(kept, judged_by="other code")):
        assert other.accuracies(zoo.multitask, "test") == zoo.accuracies(zoo.multitask, "test")
        assert other.accuracies(zoo.base, "test", ["b"]) == zoo.accuracies(zoo.base, "test", ["b"])
        assert other.accuracies(zoo.base, "validation") == zoo.accuracies(zoo.base, "validation")
    assert len(asked) == 12 + 2 * (3 + 1 + 3)


def test_processes_find_what_one_finds(zoo):
    """In the order that was asked for, whoever was done first; and a process that dies is told of."""
    chosen, told = methods.entries(["ace", "average", "fisher"]), []
    expected = compare.compare(zoo, chosen, (0.5,), told.append, chosen[:2])
    with workers.spread(2, small_zoo) as run:
        found = compare.compare(zoo, chosen, (0.5,), told.append, chosen[:2], run)
    assert [{**row, "seconds": 0} for row in found.pop("methods")] == [
        {**row, "seconds": 0} for row in expected.pop("methods")
    ]
    assert found == expected
    with pytest.raises(CfmergeError, match="--jobs 1"), workers.spread(2, functools.partial(os._exit, 1)) as run:
        list(run([compare.references]))


def test_every_entry_is_a_method():
    for entry in methods.ENTRIES:
        if entry.method not in ("regmean_pp", "auto"):  # done with the model itself, and by the merge
            cfmerge.methods.make(entry.method)
    assert len({entry.name for entry in methods.ENTRIES}) == len(methods.ENTRIES)
    assert {*methods.CURVE, *methods.QUICK} <= {entry.method for entry in methods.ENTRIES}


def test_every_method_of_the_package_is_compared_or_left_out_for_a_reason():
    known = cfmerge.methods.registry()
    text = " ".join([*(entry.method for entry in methods.entries(variants=True)), *methods.WITHOUT])
    wanted = [name for name, entry in known.items() if entry.kind == "method"]
    assert not [name for name in wanted if not re.search(rf"\b{name}\b", text)]


def test_variants_are_run_when_they_are_asked_for():
    without = {entry.name for entry in methods.entries()}
    variants = {entry.name for entry in methods.entries(variants=True)} - without
    assert {"ace", "power 1/2, ridge to the mean", "anchored at the mean"} <= without
    assert {"ace, eps_rel 7", "power 1/2, half-flattened", "anchored at Iso-C"} <= variants
    assert [entry.name for entry in methods.entries(["ace, eps_rel 7"])] == ["ace, eps_rel 7"]


def test_fresh_zoos_are_merged_by_methods_that_were_named_before():
    assert [entry.name for entry in methods.fresh()] == list(methods.FRESH)
    assert [entry.name for entry in methods.fresh(quick=True)] == ["average", "task_arithmetic", "ace", "tsv_m", "ties"]


def test_unknown_names_are_told(tmp_path, monkeypatch):
    with pytest.raises(cfmerge.CfmergeError, match="did you mean 'vision'"):
        suite.run(suite.Options(tmp_path, zoos=["visoin"]), print)
    with pytest.raises(cfmerge.CfmergeError, match="scale is small or large"):
        suite.run(suite.Options(tmp_path, scale="huge"), print)
    monkeypatch.setattr(suite, "load", lambda *given: pytest.fail("loaded, and only then told"))
    with pytest.raises(cfmerge.CfmergeError, match=r"no method 'acee'.*did you mean 'ace'"):
        suite.run(suite.Options(tmp_path / "out", methods=["acee"]), print)
    with pytest.raises(cfmerge.CfmergeError, match="--variants adds to all methods"):
        suite.run(suite.Options(tmp_path / "out", methods=["ace"], variants=True), print)
    assert not (tmp_path / "out").exists()


def test_a_run_leaves_numbers_and_a_report(tmp_path, monkeypatch, zoo):
    monkeypatch.setattr(suite, "load", lambda *given: zoo)
    asked = suite.Options(
        tmp_path, zoos=["vision"], seeds=[0], methods=["average", "ace"], command="cfmerge bench accuracy"
    )
    suite.run(asked, lambda line: None)
    rows = json.loads((tmp_path / "rows" / "vision-0.json").read_text())
    assert [row["name"] for row in rows["methods"]] == ["average", "ace"]
    assert rows["covariances"]
    assert rows["environment"]["command"] == "cfmerge bench accuracy"
    assert "ace" in (tmp_path / "toy.md").read_text() or "ace" in (tmp_path / "vision.md").read_text()

    few = asked._replace(methods=["ties", "ace"], command="cfmerge bench accuracy -m ties -m ace")
    suite.run(few, lambda line: None)
    more = json.loads((tmp_path / "rows" / "vision-0.json").read_text())
    assert [row["name"] for row in more["methods"]] == ["average", "ace", "ties"]
    assert more["environment"]["command"] == "cfmerge bench accuracy; cfmerge bench accuracy -m ties -m ace"

    monkeypatch.setattr(suite, "load", lambda *given: small_zoo(("a", "b")))
    with pytest.raises(cfmerge.CfmergeError, match="of other experts"):
        suite.run(few, lambda line: None)
    assert json.loads((tmp_path / "rows" / "vision-0.json").read_text()) == more


def test_what_a_whole_run_does_not_make_stays_with_its_experts():
    def numbers(rows, command, **more):
        methods = [{"name": name, "of": command} for name in rows]
        environment = {"command": command, "jax": command}
        references = {"base": {"a": 0.5}}
        return {"references": references, "quick": False, "methods": methods, "environment": environment, **more}

    found = numbers(["average", "ace"], "new")
    kept = numbers(["ace", "gone", "ace, eps_rel 7"], "old", peers=[{"method": "ace"}])
    stays = found | suite.what_stays(kept, found)
    assert stays["peers"] == kept["peers"]
    assert [(row["name"], row["of"]) for row in stays["methods"]] == [
        ("average", "new"), ("ace", "new"), ("ace, eps_rel 7", "old"),
    ]  # fmt: skip
    assert stays["environment"] == {"command": "old; new", "jax": "new"}
    assert suite.what_stays(numbers(["ace"], "old"), found) == {}
    assert suite.what_stays(kept | {"references": {"base": {"a": 0.6}}}, found) == {}

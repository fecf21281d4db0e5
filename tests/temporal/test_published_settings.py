"""The published setting says what its source says, and a setting that contradicts itself is refused."""

import itertools

import msgspec
import pytest
import yaml

from cfmerge.errors import CfmergeError
from cfmerge.temporal.metrics import geometric_mean, knowledge_accumulation, zero_shot_retention
from cfmerge.temporal.rules import rule
from cfmerge.temporal.settings import published

SMALL = {
    "name": "small",
    "adaptation": ["birds", "cars"],
    "held_out": ["faces"],
    "stream": "one",
    "streams": {"one": {"first": {"birds": 2, "cars": 1}, "second": {"cars": 3}}},
    "protocols": {"offline": {"init": "base", "deploy": "all", "stream": "one"}},
}


@pytest.fixture(scope="module")
def setting():
    return published("fomo-in-flux")


def test_the_scores_of_the_source_give_its_metrics_by_these_lists_of_data_sets(setting):
    check = setting.check
    accumulation = knowledge_accumulation(check["scores"], setting.adaptation)
    retention = zero_shot_retention(check["scores"], setting.held_out)
    assert round(accumulation, 2) == check["knowledge_accumulation"] == 38.47
    assert round(retention, 2) == check["zero_shot_retention"] == 67.93
    assert round(geometric_mean(accumulation, retention), 1) == check["geometric_mean"] == 51.1
    assert set(check["scores"]) == {*setting.adaptation, *setting.held_out}


def test_there_are_40_accuracies_and_one_recall_to_adapt_to_and_20_and_two_held_out(setting):
    for data_sets, accuracies, recalls in ((setting.adaptation, 40, 1), (setting.held_out, 20, 2)):
        metrics = [setting.metric(name) for name in data_sets]
        assert (metrics.count("accuracy"), metrics.count("recall@5")) == (accuracies, recalls)
    assert setting.metric("fscoco") == "recall@5"


@pytest.mark.parametrize("stream", ["random-1", "data-set-incremental-1"])
def test_a_stream_is_18381_classes_in_20_tasks_that_cover_all_adaptation_data_sets(setting, stream):
    tasks = setting.on(stream).streams[stream]
    assert [sum(task.values()) for task in tasks.values()] == [920] + [919] * 19
    assert list(tasks) == [f"task-{number:02d}" for number in range(1, 21)]
    assert {name for task in tasks.values() for name in task} == set(setting.adaptation)


def test_data_sets_come_one_after_another_in_the_incremental_stream(setting):
    """Each data set's classes lie in neighbouring tasks, and neighbouring tasks share one data set at most."""
    tasks = list(setting.on("data-set-incremental-1").trained.values())
    for name in setting.adaptation:
        at = [step for step, task in enumerate(tasks) if name in task]
        assert at == list(range(at[0], at[-1] + 1))
    assert all(len({*one} & {*other}) <= 1 for one, other in itertools.pairwise(tasks))


def test_the_shipped_rules_can_be_read_and_are_not_called_run(setting):
    assert setting.status == "not run here"
    assert setting.source["commit"].startswith("0087878")
    assert setting.model == {"name": "ViT-B/16", "library": "OpenCLIP", "weights": "laion2b_s34b_b88k"}
    for tried in setting.protocols.values():
        for text in (tried.init, tried.deploy):
            assert rule(text).text.replace("'", '"') == text
    assert next(iter(setting.protocols)) == "best-in-time"


def test_a_setting_of_ones_own_is_read_from_its_file(tmp_path):
    path = tmp_path / "setting.yaml"
    path.write_text(yaml.safe_dump(SMALL, sort_keys=False))
    found = published(path)
    assert found.tasks == ("first", "second")
    assert found.trained == {"first": ("birds", "cars"), "second": ("cars",)}
    assert found.metric("faces") == "accuracy"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"held_out": ["birds"]}, "'birds': an adaptation task cannot be held out"),
        ({"adaptation": ["birds", "car"]}, "'first' was trained on an unknown task 'cars'; did you mean 'car'"),
        ({"stream": "two"}, "unknown stream 'two'; there is: one"),
        ({"other_metrics": {"face": "recall@5"}}, "unknown data set 'face'; did you mean 'faces'"),
        ({"protocols": {"x": {"init": "bass", "deploy": "all", "stream": "one"}}}, "unknown rule 'bass'"),
        ({"protocols": {"x": {"init": "base", "deploy": "ema", "stream": "one"}}}, "weight of the newest expert"),
        ({"protocols": {"x": {"init": "base", "deploy": "all", "stream": "won"}}}, "unknown stream 'won'"),
        ({"streams": [1]}, "Expected `object`"),
        ({"adaption": []}, "unknown field `adaption`"),
    ],
)
def test_a_setting_that_contradicts_itself_is_refused_by_its_file(tmp_path, change, told):
    path = tmp_path / "setting.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **change}, sort_keys=False))
    with pytest.raises(CfmergeError, match=told) as error:
        published(path)
    assert "setting.yaml" in str(error.value)


def test_names_that_are_unknown_have_the_nearest(setting, tmp_path):
    with pytest.raises(CfmergeError, match="unknown setting 'fomo'; did you mean 'fomo-in-flux'"):
        published("fomo")
    with pytest.raises(CfmergeError, match="unknown protocol 'best-in-times'; did you mean 'best-in-time'"):
        setting.tried("best-in-times")
    with pytest.raises(CfmergeError, match="unknown stream 'random'; did you mean 'random-1'"):
        setting.on("random")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(CfmergeError, match=r"broken\.yaml"):
        published(tmp_path / "broken.yaml")


def test_a_setting_is_plain_values(setting):
    assert msgspec.convert(msgspec.to_builtins(setting), type(setting)) == setting

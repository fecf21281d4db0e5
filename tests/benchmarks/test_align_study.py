"""The study of models of different initialisation at toy size: its measures, a whole run, and one that goes on."""

import align_drawn
import align_merges
import align_nets
import align_study
import align_told
import numpy as np
import pytest

from cfmerge import align
from cfmerge.demo.data import Split

CACHES = (align_merges.models, align_merges.moments, align_merges.spaces_of, align_merges.orders)


def stripes(seed, count):
    """Images of ten classes, whose bright rows tell the class."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 10
    images = generator.integers(0, 60, (count, 28, 28), dtype=np.uint8)
    for row in (0, 1):
        images[np.arange(count), 2 * labels + row + 4] = 255
    return Split(images, labels)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("CFMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
    images = align_nets.Images(stripes(0, 400), stripes(1, 100))
    monkeypatch.setattr(align_nets, "fashion", lambda: images)
    monkeypatch.setattr(align_nets, "STEPS", dict.fromkeys(align_nets.STEPS, 60))
    monkeypatch.setattr(align_nets, "BATCH", 16)
    monkeypatch.setattr(align_merges, "POINTS", np.linspace(0, 1, 3))
    for name, value in {"SEEDS": (0, 1), "REPLICATES": (0,), "PAIRS": ((0, 1),), "SAME": ("mlp-8",)}.items():
        monkeypatch.setattr(align_study, name, value)
    for name, value in {"THREE": ("mlp-8",), "OTHER": ("mlp-8",), "UNEQUAL": ("mlp-6 mlp-8",)}.items():
        monkeypatch.setattr(align_study, name, value)
    yield
    for cache in CACHES:
        cache.cache_clear()


def test_a_barrier_is_the_most_that_the_loss_lies_above_the_line_between_its_ends():
    assert align_merges.barrier([1.0, 4.0, 3.0]) == pytest.approx(2.0)
    assert align_merges.barrier([1.0, 1.5, 3.0]) == pytest.approx(0.0)


def test_the_two_halves_of_a_replicate_are_all_classes_and_other_replicates_have_other_halves():
    halves = [align_nets.classes_of(0, which) for which in (0, 1)]
    assert sorted(halves[0] + halves[1]) == [*range(10)]
    assert align_nets.classes_of(1, 0) not in halves
    found = align_nets.of_classes(Split(np.zeros((4, 1, 1)), np.array([3, 7, 3, 1])), (1, 3))
    assert found.labels.tolist() == [1, 1, 0]


def test_a_pair_of_a_model_and_its_permuted_copy_has_no_barrier_once_matched(monkeypatch):
    (model,) = (align_nets.trained("mlp-8", 0, align_nets.fashion()),)
    spaces = align_merges.spaces_of("mlp-8")
    copy = align.permute(spaces, align_nets.flat(model), align.random_permutations(spaces, 3))
    monkeypatch.setattr(align_merges, "models", lambda net, who: (model, align_merges.tree(copy)))
    apart = align_merges.pair("mlp-8", (0, 1), "none", False, 60)
    assert apart["barrier"] > 0.05
    for method in ("weights", "activations"):
        matched = align_merges.pair("mlp-8", (0, 1), method, False, 60)
        assert matched["barrier"] == pytest.approx(0, abs=1e-4)
        assert matched["accuracy"] == pytest.approx([apart["accuracy"][0]] * 3, abs=0.011)


def test_a_zip_that_shares_nothing_is_the_ensemble_and_statistics_of_batch_norms_are_estimated_again():
    alone = align_merges.zipped("batch-4", (0,), "zip", True, 0, 60, 0.125)
    pair = align_merges.models("batch-4", (0,))
    halves = [align_nets.classes_of(0, which) for which in (0, 1)]
    test = align_nets.fashion().test
    for half, model, expected in zip(halves, pair, alone["tasks"], strict=True):
        own = align_nets.of_classes(test, half)
        logits = align_nets.logits(align_nets.network("batch-4", 5), model, align_nets.inputs(own.images))
        assert align_nets.judged(logits, own.labels)[1] == pytest.approx(expected, abs=1e-4)
    stale, fresh = (align_merges.zipped("batch-4", (0,), "zip", again, 1, 60, 0.125) for again in (False, True))
    assert stale["within"] == fresh["within"]
    assert stale["joint"] != fresh["joint"]


@pytest.mark.long
def test_the_study_runs_goes_on_where_it_was_stopped_and_tells_and_draws_all(tmp_path, monkeypatch):
    file = tmp_path / "align.jsonl"
    cells = [*align_study.cells()]
    assert len(set(cells)) == len(cells)
    assert not align_study.Run(file, 0).go(cells)
    assert not file.exists()
    run = align_study.Run(file, 20)
    assert run.go(cells)
    assert run.done == set(cells)
    page = align_told.tables(run.rows)
    for words in ("## Barriers", "## Half way", "## Means of three", "## Unequal", "## Zips", "| 50 images |"):
        assert words in page
    align_drawn.write(tmp_path, run.rows)
    assert all((tmp_path / f"align-{name}.png").stat().st_size for name in ("mlp", "zip"))

    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]))
    monkeypatch.setattr(align_nets, "fit", lambda *given: pytest.fail("what was trained is kept"))
    align_merges.models.cache_clear()
    again = align_study.Run(file, 20)
    assert again.go(cells)
    strip = [{key: value for key, value in row.items() if key != "seconds"} for row in again.rows]
    assert strip == [{key: value for key, value in row.items() if key != "seconds"} for row in run.rows]

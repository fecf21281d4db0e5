"""Joint moments of the features of several models."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cfmerge import activations
from cfmerge.align import Moments
from cfmerge.errors import CfmergeError

WIDTHS = (4, 3, 6)


def features(seed, tokens, mean=0.0):
    """Of three models: mixed, so that features vary together, within a model and across."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(tokens, 13)) @ np.random.default_rng(9).normal(size=(13, 13)) + mean
    return np.split(mixed, np.cumsum(WIDTHS)[:-1], axis=1)


def moments_of(*batches, models=("a", "b", "c")):
    moments = Moments(models)
    for batch in batches:
        moments.add("h", batch)
    return moments


def same(one, two, tolerance=1e-12):
    for name in ("covariance", "correlation", "second"):
        np.testing.assert_allclose(getattr(one, name)("h"), getattr(two, name)("h"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_moments_are_those_of_numpy_and_batches_do_not_matter(mean):
    """With means a million times the deviations too, of which a sum of squares would leave few digits."""
    batches = [features(1, 50, mean), features(2, 1, mean), features(3, 9, mean)]
    whole = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    rows = np.concatenate(whole, axis=1)
    covariance, correlation = np.cov(rows.T, bias=True), np.corrcoef(rows.T)
    for moments in (moments_of(whole), moments_of(*batches)):
        np.testing.assert_allclose(moments.covariance("h"), covariance, rtol=0, atol=1e-14 * (1 + mean) * 100)
        np.testing.assert_allclose(moments.correlation("h"), correlation, rtol=0, atol=1e-14 * (1 + mean) * 100)
        np.testing.assert_allclose(moments.of("h").mean, rows.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(moments.second("h"), rows.T @ rows / 60, rtol=1e-10, atol=1e-10)
        assert moments.of("h").tokens == 60
        np.testing.assert_array_equal(moments.covariance("h"), moments.covariance("h").T)


def test_spaces_widths_and_the_places_of_models():
    moments = moments_of(features(1, 5))
    moments.add("other", [np.ones((2, 1)), np.ones((2, 2)), np.zeros((2, 2))])
    assert moments.spaces == ("h", "other")
    assert moments.widths("h") == WIDTHS
    assert moments.slices("h") == (slice(0, 4), slice(4, 7), slice(7, 13))
    assert "h 4+3+6, other 1+2+2" in repr(moments)
    with pytest.raises(CfmergeError, match="none of space 'H'; there is: h, other"):
        moments.covariance("H")


def test_a_permuted_twin_is_read_off_the_correlation():
    x, permutation = features(1, 30)[2], np.array([3, 0, 5, 1, 4, 2])
    moments = Moments()
    moments.add("h", [x, 7 * x[:, permutation] - 3])  # correlations know no scale
    first, second = moments.slices("h")
    np.testing.assert_allclose(
        moments.correlation("h")[first, second], moments.correlation("h")[first, first][:, permutation]
    )
    assert list(moments.correlation("h")[second, first].argmax(1)) == list(permutation)


def test_dead_features_correlate_with_nothing():
    """Exactly, whatever their value, and over batches; with themselves too."""
    batches = [features(seed, 7) for seed in range(3)]
    for batch in batches:
        batch[0][:, 1], batch[2][:, 2] = 0.1, np.float32(1e7) / 3
    batches[0][1][:, 0], batches[1][1][:, 0] = 1, 2  # is the same within each batch, not over all
    moments = moments_of(*batches)
    assert list(np.flatnonzero(moments.dead("h"))) == [1, 9]
    correlation = moments.correlation("h")
    assert not correlation[[1, 9]].any()
    assert not correlation[:, [1, 9]].any()
    np.testing.assert_allclose(np.delete(np.diagonal(correlation), [1, 9]), 1)


def test_dead_features_of_one_value_are_alike_where_that_is_asked_for():
    batch = features(1, 7)
    batch[0][:, 1], batch[0][:, 3], batch[1][:, 0], batch[2][:, 2] = 0, 5, 0, 5
    moments = moments_of(batch)
    found = moments.correlation("h", dead=1.0) - moments.correlation("h")
    expected = np.zeros((13, 13))
    for same_value in ([1, 4], [3, 9]):
        expected[np.ix_(same_value, same_value)] = 1
    np.testing.assert_array_equal(found, expected)


def test_merged_moments_are_those_of_all_batches():
    batches = [features(seed, 5 + seed) for seed in range(4)]
    one, two = moments_of(*batches[:2]), moments_of(*batches[2:])
    two.add("late", features(8, 3))
    one.merge(two)
    same(one, moments_of(*batches))
    assert one.spaces == ("h", "late")
    same(two, moments_of(*batches[2:]))
    with pytest.raises(CfmergeError, match="those of a, c, b cannot be added to those of a, b, c"):
        one.merge(moments_of(*batches, models=("a", "c", "b")))
    narrow, before = moments_of([own[:, :2] for own in batches[0]]), one.of("h")
    narrow.add("new", features(8, 3))
    with pytest.raises(CfmergeError, match=r"space 'h'.*have 2 and 2 and 2 features, and had 4 and 3 and 6 before"):
        one.merge(narrow)
    assert one.of("h") is before
    assert one.spaces == ("h", "late")


def test_arrays_of_jax_and_torch_and_of_low_precision_are_taken():
    torch = pytest.importorskip("torch")
    batch = [np.asarray(own, np.float16) for own in features(1, 5)]
    same(moments_of([jnp.asarray(own) for own in batch]), moments_of(batch))
    same(moments_of([torch.tensor(own) for own in batch]), moments_of(batch))
    same(moments_of([jnp.asarray(own, jnp.bfloat16) for own in batch]), moments_of(batch), 0.1)
    for tensor in (torch.ones(5, 3, dtype=torch.bfloat16), torch.ones(5, 3, requires_grad=True)):
        with pytest.raises(
            CfmergeError, match=r"model 'b': the features are no NumPy array .*x\.detach\(\)\.float\(\)"
        ):
            moments_of([batch[0], tensor, batch[2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c: [a, b], "features of 2 models, expected of 3: a, b, c"),
        (lambda a, b, c: [a, b, c, c], "features of 4 models, expected of 3"),
        (lambda a, b, c: [a, b[:4], c], "hold 5 and 4 and 5 tokens; give those of the same inputs"),
        (lambda a, b, c: [a[:0], b[:0], c[:0]], "hold 0 and 0 and 0 tokens"),
        (lambda a, b, c: [a, b[:, :2], c], "have 4 and 2 and 6 features, and had 4 and 3 and 6 before"),
        (lambda a, b, c: [a, b, c[:, None]], r"model 'c': features have shape \(tokens, features\), found \(5, 1, 6\)"),
        (lambda a, b, c: [a, np.where(b == b[1, 2], np.nan, b), c], "'b': 1 of 3 features hold a NaN.*first is 2"),
        (lambda a, b, c: [a, b, c / 0], "model 'c': 6 of 6 features hold a NaN or an infinity"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_features_that_are_not_of_the_same_inputs_are_refused_and_change_nothing(change, message):
    moments = moments_of(features(1, 5))
    before = moments.of("h")
    with pytest.raises(CfmergeError, match=f"space 'h'.*{message}"):
        moments.add("h", change(*features(2, 5)))
    assert moments.of("h") is before


def test_names_of_models_are_two_at_least_and_differ():
    for models in (["a"], ["a", "a"], []):
        with pytest.raises(CfmergeError, match="of two models or more, each of its own name"):
            Moments(models)


# --- files --------------------------------------------------------------------------------------------------------


def test_saved_moments_are_loaded_as_they_were_and_go_on(tmp_path):
    moments = moments_of(features(1, 5))
    moments.add("blocks/0.v:x", features(3, 4))
    moments.save(tmp_path / "moments.safetensors")
    again = Moments.load(str(tmp_path / "moments.safetensors"))
    assert again.models == ("a", "b", "c")
    assert again.spaces == ("h", "blocks/0.v:x")
    for space in again.spaces:
        assert again.of(space).tokens == moments.of(space).tokens
        assert again.widths(space) == WIDTHS
        np.testing.assert_array_equal(again.covariance(space), moments.covariance(space))
        np.testing.assert_array_equal(again.of(space).mean, moments.of(space).mean)
    again.add("h", features(2, 6))
    same(again, moments_of(features(1, 5), features(2, 6)))
    assert [path.name for path in tmp_path.iterdir()] == ["moments.safetensors"]


def test_a_file_that_is_there_stays(tmp_path):
    path = tmp_path / "moments.safetensors"
    moments_of(features(1, 5)).save(path)
    before = path.read_bytes()
    with pytest.raises(CfmergeError, match="exists"):
        moments_of(features(2, 5)).save(path)
    assert path.read_bytes() == before
    with pytest.raises(CfmergeError, match=r"must be called \.safetensors"):
        moments_of(features(2, 5)).save(tmp_path / "moments.npz")
    with pytest.raises(CfmergeError, match="moments of no space"):
        Moments().save(tmp_path / "other.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["moments.safetensors"]


def test_a_file_of_something_else_is_told_apart(tmp_path):
    activations.save({"dense/kernel": np.eye(3)}, tmp_path / "grams.safetensors")
    with pytest.raises(CfmergeError, match=r"grams.*input Grams, each of one model.*collect_joint_linen or"):
        Moments.load(tmp_path / "grams.safetensors")
    save_file({"model.weight": np.eye(3), "model.bias": np.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CfmergeError, match=r"no joint moments, but 'model\.\w+' and 1 more; collect"):
        Moments.load(tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("moments")
    with pytest.raises(CfmergeError, match="not a safetensors file"):
        Moments.load(tmp_path / "text.safetensors")


def change(name, value):
    return lambda arrays, metadata: arrays.update({name: value})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda arrays, metadata: arrays.pop("h:mean"), "space 'h': tensor 'h:mean' is missing"),
        (lambda arrays, metadata: metadata.update(widths='{"h": [4, 3, 5]}'), r"mean has shape \(13,\), expected \(12"),
        (lambda arrays, metadata: metadata.update(widths='{"h": [4, 9]}'), "widths of 2 models, and the file is of 3"),
        (lambda arrays, metadata: metadata.update(widths='{"g": [4, 3, 6]}'), "'g:tokens' and 2 more is missing"),
        (lambda arrays, metadata: metadata.pop("models"), "do not tell models and widths"),
        (lambda arrays, metadata: metadata.update(models="a, b"), "do not tell models and widths"),
        (lambda arrays, metadata: metadata.update(widths="[1]"), "do not tell models and widths"),
        (change("h:covariance", np.eye(12)), r"covariance has shape \(12, 12\), expected \(13, 13\).* 4\+3\+6 are"),
        (change("h:covariance", np.full((13, 13), np.nan)), "NaN"),
        (change("h:covariance", -np.eye(13)), "negative variance"),
        (change("h:tokens", np.asarray(0)), "0 tokens"),
    ],
)  # fmt: skip
def test_a_file_with_a_fault_is_refused_with_its_name(broken, message, tmp_path):
    path = tmp_path / "moments.safetensors"
    moments_of(features(1, 5)).save(path)
    arrays = load_file(path)
    metadata = {"holds": "joint_moments", "models": json.dumps(list("abc")), "widths": '{"h": [4, 3, 6]}'}
    path.unlink()
    broken(arrays, metadata)
    save_file(arrays, path, metadata)
    with pytest.raises(CfmergeError, match=rf"moments\.safetensors.*{message}"):
        Moments.load(path)

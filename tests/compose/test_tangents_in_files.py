"""Components in files: one file each beside a JSON, over a base that is told by hashes and not stored."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tangent_parts import X, base, component, head_alone, network, three

import cfmerge
from cfmerge.compose import tangent_files
from cfmerge.compose.tangents import Tangents

ROOT = Path(__file__).parents[2]


def same(one, other):
    """Whether two hold the same components, bit for bit and in the same order, with the same coefficients."""
    assert (one.names, one.coefficients) == (other.names, other.coefficients)
    for mine, theirs in zip(one.components, other.components, strict=True):
        assert mine.keys() == theirs.keys()
        for leaf in mine:
            assert mine[leaf].dtype == theirs[leaf].dtype
            np.testing.assert_array_equal(mine[leaf], theirs[leaf])
    return True


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def saved(tmp_path):
    return tangent_files.save(three(), tmp_path / "components")


def refused(words, call):
    with pytest.raises(cfmerge.CfmergeError) as caught:
        call()
    for word in words:
        assert str(word) in str(caught.value), (word, str(caught.value))


def test_loaded_components_are_those_that_were_saved_and_answer_the_same(saved):
    loaded = tangent_files.load(saved, base())
    assert same(loaded, three())
    np.testing.assert_array_equal(loaded.apply(network, X), three().apply(network, X))


def test_the_files_are_read_by_safetensors_and_json_alone_and_hold_no_base(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "a.safetensors", "b.safetensors", "c.safetensors", "tangents.json",
    ]  # fmt: skip
    told = json.loads((saved / "tangents.json").read_text())
    assert [(entry["name"], entry["coefficient"]) for entry in told["components"]] == [
        ("a", 0.5), ("b", -0.25), ("c", 2.0),
    ]  # fmt: skip
    assert load_file(saved / "c.safetensors").keys() == {"head/kernel"}
    np.testing.assert_array_equal(load_file(saved / "a.safetensors")["hidden/bias"], component(1)["hidden/bias"])
    kernel = np.asarray(base()["head"]["kernel"])
    digest = hashlib.sha256(kernel.tobytes()).hexdigest()
    assert told["base"]["head/kernel"] == {"shape": [5, 2], "dtype": "float32", "sha256": digest}
    assert set(told["base"]) == {"hidden/kernel", "hidden/bias", "head/kernel", "steps"}


def test_dtypes_of_components_are_kept(tmp_path):
    low = Tangents(base()).add("low", {"head/kernel": component(1)["head/kernel"].astype(jnp.bfloat16)})
    assert same(tangent_files.load(tangent_files.save(low, tmp_path / "low"), base()), low)


def test_one_more_component_writes_its_own_file_and_no_other(saved):
    before = {path.name: path.stat().st_mtime_ns for path in saved.glob("*.safetensors")}
    tangent_files.append(saved, Tangents(base()).add("d", component(4), 0.125))
    after = {path.name: path.stat().st_mtime_ns for path in saved.glob("*.safetensors")}
    assert after.pop("d.safetensors")
    assert after == before
    assert same(tangent_files.load(saved, base()), three().add("d", component(4), 0.125))


def test_components_of_another_directory_are_appended(saved, tmp_path):
    other = tangent_files.save(Tangents(base()).add("d", component(4)).add("e", head_alone(5)), tmp_path / "other")
    tangent_files.append(saved, tangent_files.load(other, base()))
    assert same(tangent_files.load(saved, base()), three().add("d", component(4)).add("e", head_alone(5)))


def test_a_directory_may_begin_empty(tmp_path):
    place = tangent_files.save(Tangents(base()), tmp_path / "none")
    assert tangent_files.load(place, base()).names == ()
    tangent_files.append(place, Tangents(base()).add("a", component(1)))
    assert tangent_files.load(place, base()).names == ("a",)


def test_an_erased_component_leaves_the_files_of_one_that_never_was(saved, tmp_path):
    tangent_files.erase(saved, "b")
    never = Tangents(base()).add("a", component(1), 0.5).add("c", head_alone(3), 2.0)
    assert contents(saved) == contents(tangent_files.save(never, tmp_path / "never"))


def test_components_of_separate_processes_compose_as_those_of_one(tmp_path):
    """Each process makes the base and one component of its own; all append to one directory at the same time."""
    place = tangent_files.save(Tangents(base()), tmp_path / "shared")
    script = (
        "import sys; from tangent_parts import *; from cfmerge.compose import tangent_files\n"
        "made = Tangents(base()).add('t' + sys.argv[2], component(int(sys.argv[2])))\n"
        "tangent_files.append(sys.argv[1], made)"
    )
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(place), str(seed)], env=variables) for seed in (1, 2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    loaded = tangent_files.load(place, base())
    here = Tangents(base())
    for name in loaded.names:
        here = here.add(name, component(int(name[1:])))
    assert sorted(loaded.names) == ["t1", "t2"]
    assert same(loaded, here)
    np.testing.assert_array_equal(loaded.mean().apply(network, X), here.mean().apply(network, X))


def test_appends_at_the_same_time_lose_nothing(saved):
    names = [f"t{number}" for number in range(6)]
    threads = [
        threading.Thread(target=tangent_files.append, args=(saved, Tangents(base()).add(name, head_alone(1))))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tangent_files.load(saved, base()).names) == ["a", "b", "c", *names]


# --- errors -------------------------------------------------------------------------------------------------------


def changed(**leaves):
    tree = base()
    return {**tree, "hidden": {**tree["hidden"], **leaves}}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (base(seed=1), ["other values in 3 of 4 leaves", "sha256 of", "the very base"]),
        (changed(bias=base()["hidden"]["bias"].at[0].add(1e-6)), ["1 of 4 leaves: hidden/bias"]),
        (changed(bias=jnp.zeros(6)), ["another shape", "hidden/bias", "expected [5]", "found [6]"]),
        (changed(bias=jnp.zeros(5, jnp.bfloat16)), ["another dtype", "expected float32", "found bfloat16"]),
        ({"hidden": base()["hidden"], "steps": jnp.int32(7)}, ["lacks leaves that they know: head/kernel"]),
        ({**base(), "tail": jnp.ones(2)}, ["has leaves that they do not know: tail"]),
        ({**base(), "steps": jnp.int32(8)}, ["1 of 4 leaves: steps"]),
    ],
    ids=["all", "an-entry", "shape", "dtype", "lacks", "has-more", "integer"],
)
def test_a_changed_base_is_told_leaf_by_leaf(saved, other, words):
    refused([saved, *words], lambda: tangent_files.load(saved, other))
    before = contents(saved)
    refused([saved, *words], lambda: tangent_files.append(saved, Tangents(other).add("d", head_of(other))))
    assert contents(saved) == before


def head_of(tree):
    return {"hidden/kernel": jnp.zeros_like(tree["hidden"]["kernel"])}


def test_a_missing_component_is_told_with_the_call_that_forgets_it(saved):
    (saved / "b.safetensors").unlink()
    way_out = f"tangent_files.erase({str(saved)!r}, 'b')"
    refused([saved / "b.safetensors", "component 'b'", way_out], lambda: tangent_files.load(saved, base()))
    eval(way_out)
    assert tangent_files.load(saved, base()).names == ("a", "c")


def test_a_truncated_component_is_told(saved):
    file = saved / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused([file, "truncated"], lambda: tangent_files.load(saved, base()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "head/kernle": t["head/kernel"]}, ["no leaves of the base: head/kernle", "'head/kernel'"]),
        (lambda t: {"hidden/bias": t["hidden/bias"]}, ["lacks leaves: head/kernel"]),
        (lambda t: {**t, "head/kernel": t["head/kernel"].T.copy()}, ["'head/kernel'", "(5, 2)", "(2, 5)"]),
        (lambda t: {**t, "head/kernel": t["head/kernel"].astype(np.int32)}, ["expected floats", "found int32"]),
    ],
    ids=["unknown", "lacks", "shape", "integers"],
)
def test_a_component_that_does_not_fit_is_told(saved, change, words):
    file = saved / "b.safetensors"
    save_file(change(load_file(file)), file)
    refused([file, "saved as component 'b'", *words], lambda: tangent_files.load(saved, base()))


def test_a_leaf_that_was_not_saved_with_its_component_is_told(saved):
    shutil.copyfile(saved / "a.safetensors", saved / "c.safetensors")
    refused([saved / "c.safetensors", "tangents.json has not"], lambda: tangent_files.load(saved, base()))


def test_a_component_of_another_base_is_told(saved, tmp_path):
    other = tangent_files.save(Tangents(base(seed=1)).add("a", component(1)), tmp_path / "other")
    shutil.copyfile(other / "a.safetensors", saved / "a.safetensors")
    refused([saved / "a.safetensors", "another base"], lambda: tangent_files.load(saved, base()))


def without(key, **content):
    return json.dumps({name: value for name, value in content.items() if name != key})


WHOLE = {"format": "cfmerge.tangents", "version": 1, "components": [], "base": {}}
ONE = {"name": "a", "file": "a.safetensors", "coefficient": 1.0, "leaves": ["w"]}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        *((without(key, **WHOLE), key) for key in WHOLE),
        (json.dumps({**WHOLE, "format": "model"}), "'model'"),
        (json.dumps({**WHOLE, "version": 2}), "2"),
        (json.dumps({**WHOLE, "base": {"w": {"shape": [1]}}}), "dtype"),
        (json.dumps({**WHOLE, "components": [{"name": "a"}]}), "file"),
        (json.dumps({**WHOLE, "components": [ONE, ONE]}), "component 'a' twice"),
    ],
)
def test_a_broken_json_is_told(saved, text, found):
    (saved / "tangents.json").write_text(text)
    words = [saved / "tangents.json", "expected 'cfmerge.tangents', version 1", found]
    refused(words, lambda: tangent_files.load(saved, base()))


def test_what_is_no_directory_of_components_is_told(tmp_path):
    refused([tmp_path / "tangents.json", "No such file"], lambda: tangent_files.load(tmp_path, base()))
    gone = tmp_path / "gone"
    refused([gone, "No such file"], lambda: tangent_files.append(gone, three()))


def test_a_name_that_is_taken_and_one_that_is_not_there_are_told(saved):
    before = contents(saved)
    refused(["component 'a' already", "erase("], lambda: tangent_files.append(saved, three()))
    refused(["no component 'birds'", "a, b, c"], lambda: tangent_files.erase(saved, "birds"))
    assert contents(saved) == before


def test_a_file_that_no_component_has_is_told_and_not_loaded(saved):
    shutil.copyfile(saved / "a.safetensors", saved / "stray.safetensors")
    with pytest.warns(UserWarning, match=r"stray\.safetensors"):
        assert tangent_files.load(saved, base()).names == ("a", "b", "c")


def test_a_component_with_a_nan_is_not_saved(tmp_path):
    broken = {"head/kernel": component(1)["head/kernel"].at[0, 0].set(jnp.nan)}
    refused(
        ["component 'a'", "'head/kernel'", "NaN"],
        lambda: tangent_files.save(Tangents(base()).add("a", broken), tmp_path / "out"),
    )
    assert not list(tmp_path.iterdir())


def test_a_coefficient_that_json_cannot_hold_is_told(tmp_path):
    broken = three().scaled({"b": float("nan")})
    refused(["component 'b'", "coefficient is nan"], lambda: tangent_files.save(broken, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_directory_that_exists_is_not_written_over_unless_asked(saved):
    refused(["exists already"], lambda: tangent_files.save(three(), saved))
    tangent_files.save(three().remove("a"), saved, overwrite=True)
    assert sorted(path.name for path in saved.iterdir()) == ["b.safetensors", "c.safetensors", "tangents.json"]


def test_a_process_that_ends_between_a_file_and_the_json_leaves_the_old_components(saved, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tangent_files, "_rewrite", dies)
    with pytest.raises(KeyboardInterrupt):
        tangent_files.append(saved, Tangents(base()).add("d", component(4)))
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"d\.safetensors"):
        assert same(tangent_files.load(saved, base()), three())
    tangent_files.append(saved, Tangents(base()).add("d", component(4)))
    assert same(tangent_files.load(saved, base()), three().add("d", component(4)))

"""Readers of the fresh text tasks, on made-up packages."""

import hashlib
import io
import tarfile

import pytest

from cfmerge.errors import CfmergeError
from cfmerge_accuracy import npm, text
from cfmerge_accuracy.text import brown, fresh


def tarball(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_files_of_an_npm_package_are_read_once_its_hash_is_right(tmp_path):
    content = tarball({"package/b": b"2", "package/a": b"1", "package/readme": b""})
    (tmp_path / "x-1.tgz").write_bytes(content)
    package = npm.Package("x@1", "x-1.tgz", hashlib.sha256(content).hexdigest())
    assert list(npm.read(package, tmp_path, lambda name: len(name) == 1).items()) == [("a", b"1"), ("b", b"2")]
    with pytest.raises(CfmergeError, match="expected 00"):
        npm.read(npm.Package("x@1", "x-1.tgz", "00"), tmp_path, bool)


def test_no_npm_is_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CfmergeError, match="npm pack --silent x@1"):
        npm.read(npm.Package("x@1", "x-1.tgz", "00"), tmp_path, bool)


def test_tagged_words_become_print():
    line = "``/`` Well/uh ,/, (/( that/dt )/) 's/bez it/ppo ''/'' ;/. ;/."
    assert brown.sentences(line + "\n\n") == ['"Well, (that) \'s it";;']


def test_passages_of_a_genre_come_from_documents_of_one_split(monkeypatch):
    documents = [
        brown.Document(f"c{genre}{number:02}", [f"{genre}{number} {place}" for place in range(7)])
        for genre in "ab"
        for number in range(1, 11)
    ]
    monkeypatch.setattr(brown, "documents", lambda: documents)
    found = fresh.genre()
    assert (len(found.train), len(found.test)) == (2 * 8 * 2, 2 * 2 * 2)
    assert found.train[0] == ("a1 0 a1 1 a1 2", 0)
    train, test = ({one.split()[0] for one, _ in part} for part in (found.train, found.test))
    assert not train & test
    assert {label for _, label in found.test} == {0, 1}


def test_a_mail_is_its_subject_and_text_without_headers_markup_and_quotes():
    plain = b"Received: from example.org\nSubject: Re: [list] the plan\n\n> you said\nI agree\n"
    assert fresh.mail(plain) == "the plan. I agree"
    assert fresh.mail(b"From: a@b.c\n\n<style>b { }</style>only <br>this\n") == "only this"


def test_sentences_that_people_disagree_on_are_left(monkeypatch):
    lines = b"1_1\t-0.9\tno picture\n1_2\t-0.15\tfair enough\n2\t2.5\tgood\tindeed\n"
    monkeypatch.setattr(fresh, "member", lambda *_: tarball({"hutto_ICWSM_2014/x_GroundTruth.txt": lines}))
    found = fresh.rated("x", "review")
    assert found.train == [("no picture", 0), ("good indeed", 1)]
    assert found.classes == ("a negative review", "a positive review")


def test_fresh_experts_start_as_those_of_the_same_protocol():
    assert text.RECIPES["fresh-lora-16"] == text.RECIPES["lora-16"]
    assert len({text.own_seed("fresh-lora-16", 0, number) for number in range(5)}) == 5
    assert {text.own_seed("fresh-full", 1, number) for number in range(5)} == {1}
    assert not set(fresh.READERS) & set(text.TASKS)

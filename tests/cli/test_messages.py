"""Errors, warnings and notes: readable at 80 columns, and whole where they are to be pasted."""

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from cfmerge.cli import show
from cfmerge.cli.messages import folded, tell

RULE = '--rule "match=model.layers.*.self_attn.rotary_emb.inv_freq, method=keep-base" for all of the layers there are'
PROSE = "an expert lacks tensors that the base has and that no rule speaks of, and so it cannot be merged with others"


def test_prose_is_broken_between_words():
    lines = folded(PROSE, 40).split("\n")
    assert max(map(len, lines)) <= 40
    assert " ".join(lines) == PROSE


@pytest.mark.parametrize("start", ["  ", "- ", "", "  cfmerge merge recipe.yaml "])
def test_what_is_pasted_stays_on_its_line(start):
    """Lists, commands and rules, wherever they stand; a terminal folds them, and copies them whole."""
    text = f"{PROSE}:\n{start}{RULE}\n{PROSE}"
    assert f"{start}{RULE}" in folded(text, 40).split("\n")


def test_quoted_texts_and_long_words_stay_whole():
    rule = "'match: \"model.embed_tokens.weight\", method: keep-base'"
    name = "model.layers.0.self_attn.rotary_emb-inv_freq.weight"
    shown = folded(f"the base's vocabulary differs from the expert's, so add a rule {rule} or train {name} anew", 40)
    assert rule in shown.split("\n")
    assert name in shown.split("\n")
    option = '--rule "match=model.layers.*.weight, method=keep-base"'
    assert any(
        option in line for line in folded(f"a tensor of the base is missing: {option} leaves it", 40).split("\n")
    )
    assert folded("it's the base's, and the expert's own", 20) == "it's the base's, and\nthe expert's own"


def told(message: str, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
    tell(console, "note", message, "yellow")
    return console.file.getvalue()


@pytest.mark.parametrize("text", ["[/red] w[bold].weight", ":warning: [link=x]y", "a[0]{b}", "100 [%] \\[x]"])
def test_no_markup_in_messages(text):
    assert told(text, terminal=False) == f"note: {text}\n"


def test_nothing_is_folded_where_there_is_no_terminal():
    assert told(PROSE, terminal=False) == f"note: {PROSE}\n"
    assert told(PROSE, terminal=True) != f"note: {PROSE}\n"


def result(**values):
    plan = SimpleNamespace(
        method=SimpleNamespace(name="ace"), counts=lambda: Counter({("matrix", "ace"): 3}), bytes_to_write=1000
    )
    told = {"notes": ("a note",), "resumed": (), "bytes_written": 1000, **values}
    made = SimpleNamespace(plan=plan, output=Path("out"), seconds=1.0, **told)
    made.summary = lambda: {"output": "out"}
    return made


def test_warnings_stand_before_the_notes(capsys):
    """With the command to paste, on one line."""
    command = f"  cfmerge merge {'--expert some/long/path ' * 10}-m dc_merge -o out"
    show.merge_result(result(warnings=(f"most layers outgrow their deltas; merge again by dc_merge:\n{command}",)))
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines.index(command) == lines.index("warning: most layers outgrow their deltas; merge again by dc_merge:") + 1
    )
    assert lines.index("note: a note") > lines.index(command)
    assert lines[-1].startswith("out ")

"""Every key of a recipe has an option, and `--help` reads well in a narrow terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from cfmerge.cli import app
from cfmerge.cli.options import RECIPE
from cfmerge.recipe import Recipe

COMMANDS = typer.main.get_command(app).commands
OF_MODEL = {"dtype", "format", "shard_size", "side_files", "adapter_out", "unmerged"}  # that comes out
WITHOUT = {
    "accumulate": OF_MODEL,
    "diagnose": OF_MODEL | {"method", "parameters", "statistics", "allow", "seed", "chat_template"},
}


@pytest.mark.parametrize("command", ["merge", "plan", "sweep", "accumulate", "diagnose"])
def test_every_key_of_a_recipe_has_an_option(command):
    """On every command where it has a meaning; its name is the key's, a list's in the singular."""
    options = {parameter.name: parameter.opts for parameter in COMMANDS[command].params}
    for key in set(Recipe.__struct_fields__) - WITHOUT.get(command, set()):
        name = "method" if key == "method" else key
        assert name in options, f"{key} has no option: give it a line in cfmerge.cli.options.RECIPE"
        longest = options[name][0].removeprefix("--").replace("-", "_")
        assert key in {longest, longest + "s", longest + "eters"}, (key, options[name])
    assert not WITHOUT.get(command, set()) & set(options)


def test_every_key_of_a_recipe_is_in_the_docs():
    """With its option, in the table of docs/recipe.md."""
    page = (Path(__file__).parents[2] / "docs/recipe.md").read_text()
    options = {parameter.name: parameter.opts[0] for parameter in COMMANDS["merge"].params}
    for key in Recipe.__struct_fields__:
        assert f"\n| `{key}` | `{options[key]}`" in page


def test_no_option_of_a_recipe_is_idle():
    """But for keys that the recipe is still to get."""
    assert set(RECIPE) - set(Recipe.__struct_fields__) <= {"rename"}


def help_of(*command: str) -> list[str]:
    environment = os.environ | {"COLUMNS": "80", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "cfmerge", *command, "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "command",
    [
        "merge",
        "plan",
        "sweep",
        "accumulate",
        "diagnose",
        "combine",
        "clean",
        "convert",
        "inspect",
        "methods",
        "demo",
        "report",
    ],
)
def test_help_at_80_columns(command):
    """Each option is one line: its name, a short word for its value, and a text."""
    lines = help_of(command)
    assert max(map(len, lines)) <= 80
    start = next(n for n, line in enumerate(lines) if line.startswith("╭") and "Arguments" not in line)
    rows = [line.strip("│ *") for line in lines[start:] if line.startswith("│")]
    assert len(rows) == len([one for one in COMMANDS[command].params if one.param_type_name == "option"]) + 1
    for row in rows:
        assert row.startswith("--"), row
        assert "<" not in row
        assert "…" not in row


def test_the_options_of_merge_are_in_four_groups():
    titles = [line.strip("╭─╮ ") for line in help_of("merge") if line.startswith("╭")]
    assert titles == ["Arguments", "What is merged", "How it is merged", "Where it goes", "How it runs"]


def test_the_help_of_merge_ends_with_examples():
    lines = [line.strip() for line in help_of("merge")]
    examples = lines[lines.index("Examples") + 1 :]
    assert sum(line.startswith("cfmerge merge ") for line in examples) >= 3
    assert all(line.startswith("cfmerge merge ") for line in examples if line)

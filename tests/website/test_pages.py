"""Pages of the site: each method has one, with its equation and its source; generated parts and links are sound."""

import re
import sys
from pathlib import Path

import pytest

import cfmerge

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
METHODS = DOCS / "methods"
FAMILIES = {"README", "least_squares", "spectral", "elementwise", "interpolation", "adapters", "measured"}
NAMES = [name for name, entry in cfmerge.methods.registry().items() if entry.factory.__module__.startswith("cfmerge.")]
PAGES = sorted(DOCS.rglob("*.md"))
PARTS = ("## Parameters", "## When to use it", "## Cost", "## Evidence", "## Source", "## Use it")

sys.path.insert(0, str(ROOT / "website"))
import generated  # noqa: E402


def page(name: str) -> str:
    return (METHODS / f"{name}.md").read_text()


def test_every_page_has_a_method():
    assert {path.stem for path in METHODS.glob("*.md")} - FAMILIES == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_page(name):
    """With its equation, its parts in order, its source, and a page of its family that links to it."""
    text = page(name)
    assert text.startswith(f"# {name}\n")
    assert "```math\n" in text.partition("## ")[0]
    places = [text.index(part) for part in PARTS]
    assert places == sorted(places)
    for marker in ("facts", "evidence", *(["parameters"] if cfmerge.methods.registry()[name].signature else [])):
        assert f"<!-- site: {marker} -->" in text
    papers = re.findall(r"arXiv (\d{4}\.\d{4,5})", cfmerge.methods.registry()[name].source)
    source = text[text.index("## Source") :]
    assert all(f"https://arxiv.org/abs/{paper}" in source for paper in papers)
    assert f"[{name}]({name}.md)" in (METHODS / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_a_page_can_be_planned(name, family):
    """Its method is made with these parameters, for as many experts, and its Python line can be read."""
    text = page(name)
    command = re.search(r"```sh\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", " ")
    method = re.search(r"-m (?:'([^']+)'|(\S+))", command)
    assert name in method[0]
    made = cfmerge.methods.make(method[1] or method[2])
    compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], name, "exec")
    if made.needs.moments or made.needs.factors == "required":
        return  # what the experts here have not
    experts = [
        cfmerge.Expert(str(path), weight=float(weight or 1))
        for path, weight in zip(family.experts, re.findall(r" -e [A-Z_]+(?:@([\d.]+))?", command), strict=False)
    ]
    allow = ["one-expert"] if "--allow one-expert" in command else []
    assert cfmerge.plan(str(family.base), experts, made, allow=allow).counts()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_equations_can_be_translated(path):
    pytest.importorskip("latex2mathml")  # of the extra `docs`
    import equations

    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = path.read_text()
    shown = [block for language, block in fence.findall(text) if language == "math"]
    plain = re.sub(r"`[^`\n]*`", "", re.sub(r"^    .*$", "", fence.sub("", text), flags=re.MULTILINE))
    for block in [*shown, *re.findall(r"\$\$(.+?)\$\$", plain, re.DOTALL)]:
        assert equations.mathml(block.strip(), True).startswith("<div")
    for inline in re.findall(
        r"(?<![\w$])\$([^$\s](?:[^$]*[^$\s])?)\$(?![\w$])", re.sub(r"\$\$.+?\$\$", "", plain, flags=re.DOTALL)
    ):
        assert equations.mathml(inline, False).startswith("<math")


def test_an_equation_that_cannot_be_translated_is_told():
    pytest.importorskip("latex2mathml")
    import equations

    with pytest.raises(ValueError, match="is left in its translation"):
        equations.mathml(r"\nosuchthing x", True)


def test_generated_parts():
    assert "| `density` | `0.2` | share of each expert's entries that is kept. |" in generated.parameters("ties")
    assert "by expert too: `density`" in generated.parameters("ties")
    assert "reads the files more than once" in generated.facts("ties")
    assert "streamed" in generated.facts("ace")
    table = "## At published defaults\n\n| method | mean of a, b | a | b |\n| --- | --: | --: | --: |\n"
    told = generated.evidence(
        "ties", table + "| ties | 1.5 | 1 | 2 |\n| dare_ties | 9 | 9 | 9 |\n| average | 3 | 3 | 3 |\n"
    )
    assert "| `ties` | 1.5 | 1 | 2 |" in told
    assert "dare_ties" not in told
    assert "| *best of each column* | 9 | 9 | 9 |" in told
    assert "not run" in generated.evidence("drop", table + "| ties | 1.5 | 1 | 2 |\n")
    for command in ("merge", "sweep", "time init", "bench accuracy"):
        assert f"## cfmerge {command}\n" in generated.commands()
    assert "| `--expert`, `-e` | `EXPERT` |" in generated.commands()
    assert "::: cfmerge.linalg.gram" in generated.public("linalg")
    assert "::: cfmerge.merge\n" in generated.public("")


def test_links_to_other_sites_are_well_formed():
    """Whole addresses, and papers by their number."""
    for path in [*PAGES, ROOT / "README.md"]:
        for link in re.findall(r"\]\((\w+:[^)]*)\)", path.read_text()):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/[^\s<>\"]*)?", link), f"{path}: {link}"
            if "arxiv.org" in link:
                assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}(v\d+)?", link), f"{path}: {link}"


def test_examples_in_docstrings_are_code():
    """At the margin, or in a section, they get a fence; where they are indented they are code already."""
    pytest.importorskip("griffe")
    from doctests import as_code

    assert as_code("It.\n\n>>> 1\n1\n\nMore.") == "It.\n\n```pycon\n>>> 1\n1\n```\n\nMore."
    assert as_code("It.\n\n    >>> 1\n    1\n") == "It.\n\n    >>> 1\n    1\n"
    assert as_code("It.\n\nExample:\n    >>> [1]\n    [1]\n") == (
        "It.\n\nExample:\n    ```pycon\n    >>> [1]\n    [1]\n    ```\n"
    )

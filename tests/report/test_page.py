"""Pages: what is on them, in which order, and that nothing of a text becomes HTML."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from report_parts import EXPERTS, measured, tensors, told

from cfmerge.report.page.blocks import Code, Heat, Interval, Items, Notice, Page, Prose, Section, Table
from cfmerge.report.page.drawing import NAMES, mark
from cfmerge.report.page.layers import OURS, sections, without_last
from cfmerge.report.page.merge import page
from cfmerge.report.page.plots import MINUS, heat, lines, number
from cfmerge.report.page.rendering import html

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Ids, headings and open elements of a page."""

    def __init__(self):
        super().__init__()
        self.ids, self.headings, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def merged():
    return html(page(told(20)))


def test_a_page_is_well_formed_and_needs_nothing_else(merged):
    found = read(merged)
    assert len(set(found.ids)) == len(found.ids)
    assert found.headings[0] == 1
    assert all(after <= before + 1 for before, after in zip(found.headings, found.headings[1:], strict=False))
    assert "<script" not in merged
    addresses = re.findall(r"(?:href|src)=\"([^\"#]+)", merged) + re.findall(r"url\((?!#)[^)]*\)", merged)
    assert addresses == ["data:,"]


def test_warnings_stand_before_all_else(merged):
    order = ["The merged model is long", "Something was not measured", "code does not come", "expert &#39;code&#39;",
             "748.2 MB", "67f77108", "method: average", "Recommended:", "Layer by layer</h2>"]  # fmt: skip
    places = [merged.index(text) for text in order]
    assert places == sorted(places)


def test_texts_are_escaped():
    bad = '<script>alert("x")</script> & `<i>`'
    table = Table(bad, [bad], [[bad, Heat(bad, 0.5), Interval(bad, 0.5)]])
    made = html(
        Page(bad, bad, bad, [Section(bad, [Prose(bad), Notice("fact", bad), Code(bad, bad), Items([bad]), table])])
    )
    assert "<script" not in made
    assert "<i>" not in made
    assert "<code>&lt;i&gt;</code>" in made


def test_the_same_data_makes_the_same_page(merged):
    assert html(page(told(20))) == merged


def test_many_tensors_are_folded_by_layer(merged):
    assert "All 61 tensors, by layer" in merged
    assert merged.count("<summary>model.layers.19 (3)</summary>") == 1
    assert "All 4 tensors</summary>" in html(page(told(1, measured=None, diagnosis=None)))


def test_a_card_alone_makes_a_page():
    made = html(page(told(measured=None, diagnosis=None, tensors=())))
    assert "Layer by layer" not in made
    assert "67f77108" in made
    assert "Something was not measured" in made


def test_nothing_to_warn_of_is_said():
    made = html(page(told(warnings=(), lacking=(), notes=(), diagnosis=None, measured=None)))
    assert "Clear:" in made


def test_a_mere_warning_of_the_diagnosis_is_not_clear():
    whole = told(1, warnings=(), lacking=(), measured=None)
    kept = tuple(one for one in whole.diagnosis.findings if one.severity != "grave")
    (first, *_) = page(
        dataclasses.replace(whole, diagnosis=dataclasses.replace(whole.diagnosis, findings=kept))
    ).sections
    assert first.blocks[0] == Notice("warning", "the diagnosis has 1 warning: see there.", "Diagnosis:")


def test_numbers_have_three_digits():
    shown = [number(value) for value in (0.0, 1.0, 0.0123456, 123456.0, -2.5e-7, 0.09999999, float("nan"))]
    assert shown == ["0", "1.00", "0.0123", "1.23e5", f"{MINUS}2.50e{MINUS}7", "0.100", "\N{EN DASH}"]


def test_drawings_have_names_and_the_colours_of_the_style():
    panel = lines("norms", {"math": (0, [0, 1, 2], [1.0, 3.0, 2.0])}, key="one", x="layer")
    assert 'role="img"' in panel.svg
    assert "math: 1.00 (at 0) to 3.00 (at 1)" in panel.svg
    assert "var(--s0)" in panel.svg
    assert "<text" in panel.svg
    assert not re.search(r"#(?:fe01|[0-9a-f]{6}\b)|font-family|<metadata", panel.svg)


def test_ids_of_drawings_do_not_meet():
    ids = [
        set(re.findall(r'id="([^"]+)', lines("a", {"b": (0, [0, 1], [1.0, 2.0])}, key=key, x="x").svg)) for key in "pq"
    ]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_every_colour_is_in_the_style(merged):
    style = merged.partition("</style>")[0]
    light, dark = style.split("prefers-color-scheme: dark")
    for name in NAMES:
        assert f"--{name}: #" in light
        assert f"--{name}: #" in dark


def test_cosines_are_told_in_words():
    panel = heat("Cosine", ["a", "b", "c"], np.array([[1, 0.5, -0.2], [0.5, 1, 0], [-0.2, 0, 1.0]]), key="k")
    assert "Largest 0.50 between a and b, least -0.20 between a and c." in panel.svg
    assert panel.svg.count("<text") == 15


def test_the_merged_model_has_a_line_of_its_own():
    titles = {one.title: one for one in sections(tensors(1), EXPERTS, merged=True)}
    assert "What each expert kept of itself" in titles
    (figure,) = titles["Spectra before and after"].blocks
    assert figure.legend[-1] == (OURS, -1)
    alone = {one.title: one for one in sections(without_last(tensors(1)), EXPERTS, merged=False)}
    assert "What each expert kept of itself" not in alone
    assert OURS not in repr(alone["Spectra"].blocks[0].legend)


def test_one_expert_has_no_pairs():
    titles = [one.title for one in sections(without_last(tensors(1, experts=1)), ["math"], merged=False)]
    assert titles == ["How much each expert changed", "Spectra"]


def test_models_that_changed_nothing_have_no_pictures():
    zero = np.zeros((2, 2))
    assert sections({"a": measured(np.ones((2, 2)), [zero, zero])}, ["math", "code"], merged=False) == []


def test_marks_are_colours_of_their_own():
    assert len({mark(name) for name in NAMES}) == len(NAMES)

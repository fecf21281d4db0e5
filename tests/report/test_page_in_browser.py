"""Pages in a real browser: on a phone and a screen, light and dark, by keyboard, and as a screen reader has them.

One session of Debian's chromium sees every page. A test per promise would start as many browsers.
"""

import contextlib
import shutil

import pytest
from report_parts import told

from cfmerge.report.page.blocks import Fold, Heat, Interval, Items, Page, Prose, Section, Table
from cfmerge.report.page.merge import page
from cfmerge.report.page.rendering import html

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium")
WIDTHS, SCHEMES = (360, 1440), ("light", "dark")

# What is wrong with a page, as a list of sentences: names, headings, ids, tables, regions, contrast, overflow.
CHECKS = """() => {
  const wrong = [], all = (query, from = document) => [...from.querySelectorAll(query)];
  const hidden = (one) => one.closest('[aria-hidden="true"]');
  const told = (one) => one.getAttribute("aria-label") || one.getAttribute("aria-labelledby");
  for (const one of all("svg, img")) if (!hidden(one) && !(one.getAttribute("role") === "img" && told(one)))
    wrong.push(`a picture without a name: ${one.outerHTML.slice(0, 80)}`);
  let level = 0;
  for (const one of all("h1, h2, h3, h4, h5, h6")) {
    const next = Number(one.tagName[1]);
    if (next > level + 1) wrong.push(`h${next} after h${level}: ${one.textContent}`);
    if (!one.textContent.trim()) wrong.push("an empty heading");
    level = next;
  }
  if (all("h1").length !== 1) wrong.push(`${all("h1").length} h1`);
  for (const name of ["header", "nav", "main", "footer"])
    if (all(`body > ${name}`).length !== 1) wrong.push(`${all(name).length} ${name}`);
  if (!document.documentElement.lang || !document.title) wrong.push("no language or title");
  const ids = all("[id]").map((one) => one.id);
  if (new Set(ids).size !== ids.length) wrong.push("ids that are not unique");
  for (const one of all("a[href^='#']")) if (!document.getElementById(one.hash.slice(1)))
    wrong.push(`a link to nothing: ${one.hash}`);
  for (const one of all("[aria-labelledby]")) if (!document.getElementById(one.getAttribute("aria-labelledby")))
    wrong.push("labelled by nothing");
  for (const one of all("[role=region], section, nav, table")) if (!told(one)) wrong.push("a region without a name");
  for (const one of all("th")) if (!one.scope) wrong.push("a head of a table without a scope");
  for (const one of all("table")) for (const row of all("tr", one))
    if (row.cells.length !== one.rows[0].cells.length) wrong.push(`a row of ${row.cells.length} cells`);
  for (const one of all("figure")) if (!one.querySelector("figcaption")) wrong.push("a figure without a caption");
  for (const one of all("main *")) if (one.scrollWidth > one.clientWidth + 1 && one.tabIndex < 0
      && ["auto", "scroll"].includes(getComputedStyle(one).overflowX))
    wrong.push(`it scrolls, but not by keyboard: ${one.className}`);
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) wrong.push(`the page is ${root.scrollWidth} wide`);

  const colour = (text) => {
    const numbers = (text.match(/[\\d.]+(e-?\\d+)?/g) || [0, 0, 0, 0]).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return [...numbers.slice(0, 3).map((each) => each * scale), numbers.length > 3 ? numbers[3] : 1];
  };
  const over = (top, below) => [0, 1, 2].map((n) => top[n] * top[3] + below[n] * (1 - top[3])).concat([1]);
  const ground = (one) => {
    const above = [];
    for (let each = one; each; each = each.parentElement) above.push(colour(getComputedStyle(each).backgroundColor));
    return above.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((each) => each / 255)
      .map((each) => each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const least = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement, style = getComputedStyle(one);
    if (!walker.currentNode.data.trim() || !one.getClientRects().length || one.closest(".skip")) continue;
    const inside = one.closest("svg"), below = ground(inside ? inside.parentElement : one);
    const [a, b] = [light(over(colour(inside ? style.fill : style.color), below)), light(below)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) wrong.push(`contrast ${ratio.toFixed(2)}: ${walker.currentNode.data.trim().slice(0, 40)}`);
    const size = parseFloat(style.fontSize) * (inside ? inside.clientWidth / inside.viewBox.baseVal.width : 1);
    if (size < 10) wrong.push(`letters of ${size.toFixed(1)} pixels: ${walker.currentNode.data.trim().slice(0, 40)}`);
  }
  return [...new Set(wrong)].slice(0, 20);
}"""


@contextlib.contextmanager
def opened(events):
    """A page of a browser; errors, messages of the console and requests are appended to `events`."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        one = browser.new_page()
        one.on("console", lambda message: events.append(f"console: {message.text}"))
        one.on("pageerror", lambda error: events.append(f"error: {error}"))
        one.on("request", lambda request: events.append(f"request: {request.url}"))
        yield one
        browser.close()


def numbers() -> Page:
    """A page with the blocks that the results of the accuracy suite have, and that of a merge has not."""
    cells = [["ace", Interval("96.8 [90.1, 101.0]", 0.9, 0.7, 1.0), Heat("96.8", 0.9)],
             ["average", Interval("80.1", 0.5), Heat("-3.0", -1.0)]]  # fmt: skip
    table = Table("Methods", ["method", "normalised [95 %]", "mean of seven zoos"], cells, left=2)
    blocks = [Prose("Of **two** seeds."), table, Fold("More", [Items(["`ace`: a note"]), table])]
    return Page("Benchmark", "Does merging work?", "two zoos", [Section("vision", blocks, [Section("Why", [table])])])


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the browser has seen: `{page: {"events", "wrong", "ground", "keys"}}`."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    with opened(events := []) as one:
        for name, made in {"merge": page(told(20)), "numbers": numbers()}.items():
            (folder / f"{name}.html").write_text(html(made))
            events.clear()
            one.goto((folder / f"{name}.html").as_uri())
            keys = []
            one.keyboard.press("Tab")
            keys.append(one.evaluate("[document.activeElement.className, document.activeElement.offsetLeft >= 0]"))
            one.keyboard.press("Enter")
            keys.append(one.evaluate("[document.activeElement.id, location.hash]"))
            one.focus("summary")
            one.keyboard.press("Space")
            keys.append(one.evaluate("document.querySelector('summary').parentElement.open"))
            keys.append(one.evaluate("getComputedStyle(document.querySelector('summary')).outlineStyle"))
            one.set_viewport_size({"width": WIDTHS[0], "height": 900})
            wrong: dict = {("folded", "light"): one.evaluate(CHECKS)}
            ground: dict = {}
            one.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
            for width in WIDTHS:
                one.set_viewport_size({"width": width, "height": 900})
                for scheme in SCHEMES:
                    one.emulate_media(color_scheme=scheme)
                    wrong[width, scheme] = one.evaluate(CHECKS)
                    ground[scheme] = one.evaluate("getComputedStyle(document.body).backgroundColor")
            found[name] = {"events": list(events), "wrong": wrong, "ground": ground, "keys": keys}
    return found


NAMES = ("merge", "numbers")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wrong_on_a_phone_and_a_screen(seen, name):
    """Names, headings, landmarks, ids, tables, contrast, sizes of letters, and no overflow, in both schemes."""
    for (width, scheme), wrong in seen[name]["wrong"].items():
        assert not wrong, f"{width} {scheme}: {wrong}"


@pytest.mark.parametrize("name", NAMES)
def test_the_console_is_silent_and_nothing_is_fetched(seen, name):
    (only,) = seen[name]["events"]
    assert only.startswith("request: file://")
    assert only.endswith(f"{name}.html")


def test_dark_mode_is_dark(seen):
    ground = seen["merge"]["ground"]
    assert sum(map(int, ground["dark"].strip("rgb()").split(","))) < 150
    assert sum(map(int, ground["light"].strip("rgb()").split(","))) > 700


@pytest.mark.parametrize("name", NAMES)
def test_the_keyboard_reaches_all(seen, name):
    """The first key shows a link that skips to the report; a fold opens by the space bar and shows the focus."""
    skip, reached, opens, outline = seen[name]["keys"]
    assert skip == ["skip", True]
    assert reached == ["main", "#main"]
    assert opens
    assert outline == "solid"

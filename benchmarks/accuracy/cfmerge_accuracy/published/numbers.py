"""Published accuracies in per cent, by suite, line and task; each with its source."""

from collections.abc import Mapping
from typing import NamedTuple

from cfmerge_accuracy.published.suites import CLIP, GPT2, Suite

FUSION_BENCH = "fusion_bench, docs/modelpool/gpt2_classification.md, on these checkpoints; its MNLI is the matched set"
FUSION_CLIP = "fusion_bench, docs/modelpool/clip_vit.md, on these checkpoints"
ACE = "ACE-Merging, arXiv 2603.02945v2, on these checkpoints; its code evaluates MNLI on the mismatched set"
OTHERS = "ACE-Merging, arXiv 2603.02945v2, on other checkpoints (those of TALL-masks; their experts have 94.6)"
TSV_OTHERS = "TSV-M, arXiv 2412.00081, on the checkpoints of TALL-masks; scale chosen on validation data"


class Published(NamedTuple):
    """One published line: its average, its accuracies by task where they are known, and where they come from."""

    average: float
    by_task: Mapping[str, float]
    source: str


def _of(suite: Suite, average: float, values: str, source: str) -> Published:
    names = [task.name for task in suite.counted]
    return Published(average, dict(zip(names, map(float, values.split()), strict=True)) if values else {}, source)


PUBLISHED: dict[str, dict[str, list[Published]]] = {
    "gpt2": {
        "experts": [_of(GPT2, 82.0, "76.8 82.1 80.4 88.3 89.6 65.3 91.2", FUSION_BENCH)],
        "base": [_of(GPT2, 44.5, "30.9 33.0 31.4 49.2 63.2 52.7 50.9", FUSION_BENCH)],
        "average": [_of(GPT2, 56.1, "55.0 55.1 51.0 57.6 76.7 44.8 52.5", FUSION_BENCH)],
        "task_arithmetic": [_of(GPT2, 70.0, "68.7 68.6 69.6 70.5 81.8 47.3 83.6", FUSION_BENCH)],
        "tsv_m": [_of(GPT2, 70.2, "65.6 75.4 58.6 64.4 86.2 55.6 85.7", ACE)],
        "ace_published": [_of(GPT2, 74.1, "70.3 69.9 71.8 76.7 79.0 62.5 88.5", ACE)],
    },
    "clip": {
        "experts": [_of(CLIP, 92.3, "78.9 85.9 96.6 99.0 97.6 99.0 99.7 82.3", FUSION_CLIP)],
        "base": [_of(CLIP, 55.3, "65.5 64.6 66.3 54.1 51.9 43.4 51.7 44.9", FUSION_CLIP)],
        "average": [
            _of(CLIP, 72.3, "68.7 69.0 75.0 83.2 74.9 62.5 93.7 51.1", FUSION_CLIP),
            _of(CLIP, 72.2, "", OTHERS),
        ],
        "task_arithmetic": [
            _of(CLIP, 77.1, "65.9 68.3 75.4 84.5 88.8 81.9 98.0 53.9", FUSION_CLIP),
            _of(CLIP, 75.4, "", OTHERS),
        ],
        "tsv_m": [_of(CLIP, 89.0, "", TSV_OTHERS)],
        "ace_published": [_of(CLIP, 90.6, "", OTHERS)],
    },
}

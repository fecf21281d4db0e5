"""Accuracy of a CLIP image encoder under zero-shot heads of the base's text encoder.

A class's vector is the mean of its templates' unit vectors, again of unit length (OpenAI's CLIP, and fusion_bench). An
image's class is that whose vector has the largest product with the image's.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.models.buffers import is_buffer
from cfmerge_accuracy.published.gpt2 import Counted
from cfmerge_accuracy.published.pictures import Classes, Pictures
from cfmerge_accuracy.published.tensors import finite

PREFIX = "vision_model."
TEXTS = 256  # at a time


def encoder_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a model's image encoder, named as in the whole model; buffers are left out.

    The projection behind it belongs to it where a model has one.

    Raises:
        CfmergeError: one holds NaN or infinity.
    """
    opened = cfmerge.open(path)
    alone = not any(name.startswith(PREFIX) for name in opened)
    found = {}
    for name in opened:
        bare = PREFIX + name if alone else name
        ours = bare.startswith(PREFIX) or bare == "visual_projection.weight"
        if ours and not is_buffer(bare, opened.tensors[name].shape):
            found[bare] = finite(path, name, opened[name])
    return found


class Clip:
    """The base's model, whose image encoder is replaced, and the heads of the tasks, each made once."""

    def __init__(self, base: Path, device: str = "cpu") -> None:
        import transformers

        check_base(base)
        self.device = device
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.CLIPModel.from_pretrained(base, dtype="float32").eval().to(device)
        transformers.utils.logging.enable_progress_bar()
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(base)
        pillow = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
        self.processor = getattr(transformers, pillow).from_pretrained(base)
        self.encoder = encoder_of(base)
        self._heads: dict[str, Any] = {}

    def encode_by(self, encoder: Mapping[str, np.ndarray]) -> None:
        """Replaces the image encoder; the projection behind it is the base's where the encoder comes without one.

        Raises:
            CfmergeError: a tensor is missing, or the base has none of its name.
        """
        import torch

        needed = {name for name in self.encoder if name.startswith(PREFIX)}
        missing, more = sorted(needed - set(encoder)), sorted(set(encoder) - set(self.encoder))
        if missing or more:
            raise CfmergeError(
                f"the image encoder does not fit the base's; missing: {', '.join(missing) or 'none'}; more: "
                f"{', '.join(more) or 'none'}"
            )
        state = {name: torch.tensor(value) for name, value in {**self.encoder, **encoder}.items()}
        self.model.load_state_dict(state, strict=False)

    def head(self, task: str, classes: Classes) -> Any:
        """The vectors of a task's classes, one a row."""
        import torch

        if task not in self._heads:
            texts = [text for name in classes.classes for text in classes.texts(name)]
            with torch.inference_mode():
                parts = [self._texts(texts[first : first + TEXTS]) for first in range(0, len(texts), TEXTS)]
                vectors = self._unit(torch.cat(parts)).unflatten(0, (len(classes.classes), len(classes.templates)))
                self._heads[task] = self._unit(vectors.mean(1))
        return self._heads[task]

    def _texts(self, texts: Sequence[str]) -> Any:
        """Their projected vectors. Attention is causal, so that padding behind the end of a text changes nothing."""
        longest = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return self.model.text_projection(self.model.text_model(**inputs.to(self.device)).pooler_output)

    @staticmethod
    def _unit(vectors: Any) -> Any:
        return vectors / vectors.norm(dim=-1, keepdim=True)

    def logits(self, task: str, classes: Classes, images: Sequence[Any]) -> Any:
        """Products of images' and classes' unit vectors, times the scale that CLIP has learnt."""
        import torch

        head = self.head(task, classes)
        with torch.inference_mode():
            pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
            vectors = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
            return self.model.logit_scale.exp() * self._unit(vectors) @ head.T

    def count(
        self, task: str, classes: Classes, pictures: Pictures, numbers: Sequence[int], batch: int = 64
    ) -> Counted:
        """Right answers on the images of these numbers."""
        started, correct = time.monotonic(), 0
        for some in _batches(pictures.images(numbers), batch):
            found = self.logits(task, classes, [image for _, image in some]).argmax(-1).tolist()
            correct += sum(one == label for one, (label, _) in zip(found, some, strict=True))
        return Counted(correct, len(numbers), time.monotonic() - started)


def _batches(images: Iterable[tuple[int, Any]], size: int) -> Iterator[list[tuple[int, Any]]]:
    rest = iter(images)
    while some := list(islice(rest, size)):
        yield some


def check_base(base: Path) -> None:
    """Raises `CfmergeError` if the base is not a whole CLIP with what prepares texts and images."""
    lacking = [name for name in ("config.json", "preprocessor_config.json") if not (base / name).is_file()]
    if not any((base / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        lacking.append("tokenizer.json")
    if lacking:
        raise CfmergeError(f"{base}: no {', '.join(lacking)}; fetch the whole repository again")
    tensors = cfmerge.open_checkpoint(base).tensors
    for name in ("logit_scale", "text_projection.weight", "visual_projection.weight"):
        if name not in tensors:
            raise CfmergeError(f"{base}: has no tensor {name}: it is no whole CLIP model")

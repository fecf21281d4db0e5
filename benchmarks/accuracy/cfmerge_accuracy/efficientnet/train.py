"""The network in PyTorch, and fine-tuning in full: on CPUs its convolutions' gradients take a third of XLA's time.

Running statistics follow the batches, as in `nn.BatchNorm` (PyTorch's variances divide by one less than the count).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfmerge.demo.data import Split
from cfmerge.demo.train import Schedule
from cfmerge.errors import CfmergeError
from cfmerge_accuracy.convolutional.train import drawn
from cfmerge_accuracy.efficientnet import weights
from cfmerge_accuracy.efficientnet.model import EPSILON, EfficientNet
from cfmerge_accuracy.images.heads import LOGIT_SCALE, Head, stacked
from cfmerge_accuracy.text.train import rate
from cfmerge_accuracy.zoo import Params


def pytorch() -> Any:
    """PyTorch, with one thread, so that sums are added up alike everywhere."""
    try:
        import torch
    except ImportError as error:
        raise CfmergeError("EfficientNet is read and trained in PyTorch: pip install torch") from error
    torch.set_num_threads(1)
    return torch


@dataclasses.dataclass(frozen=True)
class Network:
    """A network's tensors by PyTorch's names; `train` uses the batch's statistics and updates the running ones."""

    net: EfficientNet
    tensors: Mapping[str, Any]
    train: bool = False

    def pooled(self, x: Any) -> Any:
        """Pixels `(batch, 3, side, side)` in -1..1 to what ImageNet's classifier sees, `(batch, dim)`."""
        relu6 = pytorch().nn.functional.relu6
        x = relu6(self.norm("_bn0", self.convolution("_conv_stem", x, 2)))
        number = 0
        for stage in self.net.stages:
            for repeat in range(stage.repeats):
                x = self.block(f"_blocks.{number}", x, 1 if repeat else stage.stride, stage.expand)
                number += 1
        return relu6(self.norm("_bn1", self.convolution("_conv_head", x, 1))).mean((2, 3))

    def block(self, name: str, x: Any, stride: int, expand: int) -> Any:
        relu6, y = pytorch().nn.functional.relu6, x
        if expand > 1:
            y = relu6(self.norm(f"{name}._bn0", self.convolution(f"{name}._expand_conv", y, 1)))
        y = relu6(self.norm(f"{name}._bn1", self.convolution(f"{name}._depthwise_conv", y, stride, y.shape[1])))
        y = self.norm(f"{name}._bn2", self.convolution(f"{name}._project_conv", y, 1))
        return x + y if x.shape == y.shape else y

    def convolution(self, name: str, x: Any, stride: int, groups: int = 1) -> Any:
        """With zeros around as for TensorFlow's "SAME": what is odd goes to the right and below."""
        functional, kernel = pytorch().nn.functional, self.tensors[f"{name}.weight"]
        sides: list[int] = []
        for size, window in zip(reversed(x.shape[2:]), reversed(kernel.shape[2:]), strict=True):
            missing = max(0, (-(-size // stride) - 1) * stride + window - size)
            sides += [missing // 2, missing - missing // 2]
        return functional.conv2d(functional.pad(x, sides), kernel, stride=stride, groups=groups)

    def norm(self, name: str, x: Any) -> Any:
        own = [self.tensors[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        momentum = 1 - self.net.momentum  # PyTorch's is the share of the new
        return pytorch().nn.functional.batch_norm(x, *own, self.train, momentum, EPSILON)


def pixels(images: np.ndarray, side: int) -> Any:
    """Grey `(batch, 28, 28)` uint8 to `(batch, 3, side, side)` in -1..1."""
    torch = pytorch()
    x = ((torch.from_numpy(images).float() - 127) / 128)[:, None]
    x = torch.nn.functional.interpolate(x, (side, side), mode="bilinear", align_corners=False)
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def fit(
    net: EfficientNet,
    schedule: Schedule,
    variables: Params,
    seed: Sequence[int],
    splits: Mapping[int, Split],
    heads: Sequence[Head],
) -> Params:
    """Trains on the splits in equal shares, image by image among the classes of its own head.

    Args:
        variables: where it starts, running statistics among them.
        schedule: AdamW with a linear warm-up over the first tenth and a cosine decay to zero.
        seed: of the order of the images.
        splits: by the position of their heads.
        heads: of all tasks.
    """
    torch = pytorch()
    tensors = {name: torch.tensor(value) for name, value in weights.to_torch(variables).items()}
    network = Network(net, tensors, train=True)
    trained = [tensor.requires_grad_() for name, tensor in tensors.items() if "running" not in name]
    optimizer = torch.optim.AdamW(trained, schedule.learning_rate, weight_decay=1e-4, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, schedule.steps))
    every = stacked(heads)
    rows, offsets = torch.from_numpy(every.embeddings), torch.from_numpy(every.offsets)
    for images, labels in drawn(schedule, splits, heads, np.random.default_rng(seed)):
        admitted = torch.from_numpy(every.task[None, :] == every.task[labels][:, None])
        features = torch.nn.functional.normalize(network.pooled(pixels(images, net.side)), dim=-1)
        logits = (LOGIT_SCALE * (features @ rows.T - offsets)).masked_fill(~admitted, -math.inf)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels.astype(np.int64)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
    return weights.from_torch({name: tensor.detach().numpy() for name, tensor in tensors.items()})

"""EfficientNet-Lite0 with ImageNet's weights, fine-tuned in full on three image tasks.

model.py    the network in Flax
weights.py  ImageNet's weights, out of a package, and their names in PyTorch
train.py    the network in PyTorch, and fine-tuning
suite.py    sizes, and all of it as one `Zoo`; tasks and heads are those of `cfmerge_accuracy.images`
"""

from cfmerge_accuracy.efficientnet.suite import load as load

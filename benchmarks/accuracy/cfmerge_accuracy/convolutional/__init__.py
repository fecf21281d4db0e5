"""Convolutional: a small ConvNet with batch norms, pre-trained on Fashion-MNIST and fine-tuned on six image tasks.

model.py   the network, and how running statistics are estimated again
train.py   pre-training and fine-tuning
suite.py   its sizes, and all of it as one `Zoo`; tasks and heads are those of `cfmerge_accuracy.images`
"""

from cfmerge_accuracy.convolutional.suite import load as load

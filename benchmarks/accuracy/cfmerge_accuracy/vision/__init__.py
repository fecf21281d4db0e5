"""Vision: a small ViT, pre-trained on Fashion-MNIST and fine-tuned into an expert for each of eight image tasks.

model.py    the network
train.py    pre-training and fine-tuning
adapters.py fine-tuning by LoRA
suite.py    its sizes, and all of it as one `Zoo`; tasks and heads are those of `cfmerge_accuracy.images`
"""

from cfmerge_accuracy.vision.suite import load as load

"""Vision: a small ViT, pre-trained on Fashion-MNIST and fine-tuned into an expert for each of eight image tasks.

data.py     the tasks, from packages alone      debian.py   packages of Debian, fetched and read
model.py    the network and its frozen heads    train.py    pre-training and fine-tuning
measure.py  Fisher information                  suite.py    all of it as one `Zoo`
"""

from cfmerge_accuracy.vision.suite import load as load

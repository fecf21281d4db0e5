"""The decoder domain: a small language model, pre-trained on the Brown corpus, fine-tuned on six kinds of text.

data.py    the corpora as windows of tokens; splits without common documents
model.py   the network
train.py   pre-training; fine-tuning in full or by LoRA
suite.py   base and experts as a `Zoo`
"""

from cfmerge_accuracy.decoder.suite import load as load

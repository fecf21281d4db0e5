"""Does merging work? Real experts on real data, every method, honestly compared: `cfmerge bench accuracy`.

suite.py          the whole run: a file of numbers for every zoo and seed, then the report
zoo.py            what the suite knows of a domain: a base, its experts, and how good a model is
vision/           a small ViT, pre-trained and fine-tuned in Flax on images
convolutional/    a small ConvNet with batch norms
efficientnet/     EfficientNet-Lite0 with ImageNet's weights, fine-tuned in PyTorch
images/           what these three share: images, frozen heads, the way from a network to a zoo
text/             MiniLM, fine-tuned in PyTorch, in full and by LoRA; evaluated in Flax and in PyTorch
decoder/          a small language model in Flax, fine-tuned on kinds of text, in full and by LoRA
linear.py         linear regression with known input covariances: the excess risk is exact
cache.py          what is trained, measured or drawn, on disk, by a hash of what made it
debian.py         packages of Debian, fetched and read
npm.py            packages of npm, fetched and read
fisher.py         diagonal Fisher information
methods.py        which methods are compared, at which settings
compare.py        the protocol: merge, evaluate, choose one scale on validation examples, evaluate again
processes.py      processes held to cores of their own; training has one core each, and so the same result anywhere
workers.py        the parts of a comparison in processes
proxies.py        estimated against true covariances (covariances.py), and errors of layers' outputs
published/        published tables, measured again on published checkpoints: `cfmerge bench published`
report.py         tables.py, plots.py and JSON of results.py, with the intervals of statistics.py
page.py           all of it as one page of HTML
"""

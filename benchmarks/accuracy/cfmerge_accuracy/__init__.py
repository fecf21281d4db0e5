"""Does merging work? Real experts on real data, every method, honestly compared: `cfmerge bench accuracy`.

zoo.py            what the suite knows of a domain: a base, its experts, and how good a model is
vision/           a small ViT, pre-trained and fine-tuned in Flax on images
text/             MiniLM, fine-tuned in PyTorch, in full and by LoRA; evaluated in Flax and in PyTorch
convolutional/    a small ConvNet with batch norms
linear.py         linear regression with known input covariances: the excess risk is exact
methods.py        which methods are compared, at which settings
compare.py        the protocol: merge, evaluate, choose one scale on validation images, evaluate again
proxies.py        estimated against true covariances, and errors of layers' outputs
report.py         tables, plots and JSON
"""

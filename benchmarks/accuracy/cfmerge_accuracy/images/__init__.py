"""What the domains of images share: images, frozen heads, and the way from a network to a `Zoo`.

data.py     eight tasks and what the base is trained on, from packages alone
heads.py    frozen class embeddings above a trunk, and likelihoods under them
suite.py    base, experts and multi-task model, out of the cache where they are there, and what is measured of them
"""

"""Published tables, measured again on published checkpoints: `cfmerge bench published`.

suites.py    GPT-2 on GLUE and CLIP on images: tasks, checkpoints, data, and the lines of the tables
numbers.py   the numbers that were published, each with its source
places.py    repositories of the hub in a folder: downloads, or the hub's cache
glue.py      GLUE's validation sets, from parquet or from its own files
pictures.py  test sets of images, from parquet or from folders by class
classes.yaml class names and templates of CLIP's zero-shot heads
gpt2.py      accuracy of a GPT-2 trunk under an expert's head
clip.py      accuracy of an image encoder under zero-shot heads
tensors.py   checks of a model's tensors: finite, of the base's shapes
checks.py    what is there, and what is wrong with it, from headers alone
run.py       merge, evaluate, keep each number as it comes
tables.py    the tables, beside the published numbers
"""

"""Checkpoints and data of the published tables' form, tiny: as the hub has them, with random weights and texts."""

import io
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from cfmerge_accuracy.published import glue, pictures
from cfmerge_accuracy.published.suites import CLIP, GPT2

END = "<|endoftext|>"
WORDS = ("the", "film", "was", "good", "bad", "not", "very", "plot", "of", "and", "people", "saw", "no", "one", "why")


def gpt2_tokenizer(folder):
    """Bytes and the end of text, as GPT-2's files have them; 257 tokens."""
    vocab = {token: number for number, token in enumerate([*sorted(ByteLevel.alphabet()), END])}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([END])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024, "bos_token": END, "eos_token": END,
        "unk_token": END,
    }))  # fmt: skip


def gpt2_config(labels=2, **more):
    sizes = {"vocab_size": 257, "n_positions": 512, "n_embd": 8, "n_layer": 2, "n_head": 2} | more
    ends = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    return transformers.GPT2Config(num_labels=labels, **sizes, **ends)


def noise(model, scale, seed):
    """The tensors of a model, each with some noise."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + scale * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }


def write(folder, tensors, config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config.save_pretrained(folder)


def gpt2_models(root, scale=0.05, **sizes):
    """`gpt2`, a language model without prefix and with causal masks, and the seven experts, each with its head."""
    torch.manual_seed(0)
    config = gpt2_config(**sizes)
    base = transformers.GPT2Model(config)
    start = noise(base, 0.3, 100)
    length = config.n_positions
    mask = torch.tril(torch.ones(length, length)).view(1, 1, length, length)
    write(root / "gpt2", start | {f"h.{n}.attn.bias": mask.clone() for n in range(config.n_layer)}, config)
    gpt2_tokenizer(root / "gpt2")
    for number, task in enumerate(GPT2.counted):
        own = gpt2_config(len(glue.SETS[task.name].labels), **sizes)
        model = transformers.GPT2ForSequenceClassification(own)
        model.transformer.load_state_dict(start)
        write(root / task.expert, noise(model, scale * (1 + number), number), own)


def sentence(generator, words=12):
    return " ".join(generator.choices(WORDS, k=generator.randint(1, words)))


def glue_sets(root, count=9, words=12, names=tuple(glue.SETS)):
    """Parquet files as `nyu-mll/glue` has them, with the names of labels in their metadata."""
    for task in names:
        one, generator = glue.SETS[task], random.Random(task)
        labels = [number % len(one.labels) for number in range(count)]
        columns = {name: [sentence(generator, words) for _ in range(count)] for name in one.columns}
        path = root / "glue" / one.config / f"{one.split}-00000-of-00001.parquet"
        write_parquet(path, columns | {"label": labels, "idx": list(range(count))}, one.labels)
    return root / "glue"


def write_parquet(path, columns, names):
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(told), path)


def clip_models(root, **more):
    """`openai/clip-vit-base-patch16`, whole, and the eight experts, image encoders alone; of 32 x 32 pixels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2} | more
    ends = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text = {"vocab_size": 514, "max_position_embeddings": 77, "projection_dim": 8, **sizes, **ends}
    vision = {"image_size": 32, "patch_size": 8, "projection_dim": 8, **sizes}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    base = root / CLIP.base[0]
    model = transformers.CLIPModel(config)
    start = noise(model, 0.2, 100)
    write(base, start, config)
    clip_tokenizer(base)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(base)
    encoder = {name: value for name, value in start.items() if name.startswith("vision_model.")}
    for number, task in enumerate(CLIP.tasks):
        generator = torch.Generator().manual_seed(number)
        changed = {
            name: value + 0.02 * (1 + number) * torch.randn(value.shape, generator=generator)
            for name, value in encoder.items()
        }
        write(root / task.expert, changed, config.vision_config)


def clip_tokenizer(folder):
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", END]
    made = transformers.CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    made.save_pretrained(folder)


def image(generator, side=36):
    pixels = generator.integers(0, 255, (side, side + 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_sets(root, count=12, names=None):
    """Parquet files of images in PNG, sorted by class; MNIST in folders by class."""
    for task in CLIP.tasks if names is None else map(CLIP.task, names):
        classes = pictures.classes_of(task.name).classes
        generator = np.random.default_rng(len(classes))
        labels = [number * len(classes) // count for number in range(count)]
        folder = root / task.data
        if task.name == "mnist":
            for number, label in enumerate(labels):
                place = folder / "test" / classes[label]
                place.mkdir(parents=True, exist_ok=True)
                image(generator).save(place / f"{number}.png")
            continue
        stored = []
        for number in range(count):
            file = io.BytesIO()
            image(generator).save(file, "PNG")
            stored.append({"bytes": file.getvalue(), "path": f"{number}.png"})
        inner = pictures.CONFIGS.get(task.name, "data")
        for part, some in enumerate(np.array_split(np.arange(count), 2)):  # two files
            columns = {"image": [stored[n] for n in some], "label": [labels[n] for n in some]}
            write_parquet(folder / inner / f"test-{part:05}-of-00002.parquet", columns, classes)

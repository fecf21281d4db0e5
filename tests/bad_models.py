"""Models on disk that are changed in place, to be bad input."""

from safetensors.numpy import load_file, save_file

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"


def rewrite(directory, change):
    """Changes the tensors of a model in place."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def spoil(directory, name, value, at=0):
    def change(tensors):
        tensors[name].reshape(-1)[at] = value

    rewrite(directory, change)

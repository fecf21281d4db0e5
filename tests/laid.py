"""A builder of directories, `laid(path, {file: content})`: safetensors from arrays, JSON from values, text, bytes."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def laid(path: Path, files: dict) -> Path:
    """Writes the files below `path`, which is returned."""
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors") and isinstance(content, dict):
            save_file(content, file, metadata={"format": "pt"})
        elif isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def ones(*names: str, value: float = 1.0, shape: tuple = (2, 2)) -> dict[str, np.ndarray]:
    return {name: np.full(shape, value, np.float32) for name in names}


def index(where: dict[str, str], metadata: object = None) -> dict:
    return {"metadata": metadata, "weight_map": where}


def headers_of(tensors: dict[str, np.ndarray]) -> dict:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def in_pieces(writer, tensors: dict[str, np.ndarray]) -> None:
    """Writes each tensor in two pieces, the second one first, the last tensor first, and closes the writer."""
    for name, tensor in reversed(tensors.items()):
        half = tensor.size // 2
        writer.write(name, tensor.reshape(-1)[half:], half)
        writer.write(name, tensor.reshape(-1)[:half])
    writer.close()

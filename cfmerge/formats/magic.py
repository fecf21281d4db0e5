"""Files that were taken for safetensors: their true format, by the first bytes and the name, and the way out."""

from pathlib import Path

CONVERT = "AutoModel.from_pretrained(DIR).save_pretrained(OUT, safe_serialization=True)"
LFS = b"version https://git-lfs"
PICKLE = (
    "this is a PyTorch pickle, not safetensors; it is not opened, because pickles run code. Convert it with "
    f"transformers: {CONVERT}"
)
GGUF = (
    "is a GGUF file, quantised for llama.cpp; merge the model that it was made from, or turn it back with "
    "transformers: AutoModelForCausalLM.from_pretrained(DIR, gguf_file=NAME).save_pretrained(OUT)"
)
HDF5 = (
    "is an HDF5 file (TensorFlow or Keras); convert it with transformers: "
    "AutoModel.from_pretrained(DIR, from_tf=True).save_pretrained(OUT)"
)
ARCHIVE = "is an archive; unpack it, and name the directory that it held"
BEGINS = (  # (first bytes, what the file is and the way out)
    (b"\x80\x02", PICKLE),
    (b"\x80\x04", PICKLE),
    (b"GGUF", GGUF),
    (b"\x89HDF", HDF5),
    (b"\x93NUMPY", "is a NumPy array, not a model; name a model directory or a .safetensors file"),
    (b"\x1f\x8b", ARCHIVE),
    (b"BZh", ARCHIVE),
    (b"\xfd7zXZ", ARCHIVE),
    (b"\x28\xb5\x2f\xfd", ARCHIVE),
)
TEXT = {".json", ".md", ".txt", ".yaml", ".yml", ".model", ".py", ".jinja"}


def is_lfs_pointer(path: Path) -> bool:
    """Whether there is a Git LFS pointer where a file should be: some lines of text instead of the content."""
    if path.stat().st_size > 1024:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def lfs_advice(path: Path) -> str:
    return (
        f"{path}: is a Git LFS pointer, not the file itself: the repository was cloned without its large files. "
        f"Fetch them: cd {path.parent} && git lfs pull"
    )


def wrong_file(path: Path, start: bytes, size: int) -> str | None:
    """The message about a file that is certainly no safetensors file; None if it may be one.

    Args:
        start: its first bytes.
        size: the whole file's.
    """
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 8 + length <= size and path.suffix not in TEXT:
        return None  # the length of a header may look like the first bytes of a pickle
    if start.startswith(LFS):
        return lfs_advice(path)
    if path.name.endswith(".index.json"):
        return f"{path}: is an index of shards; name the directory that it lies in: {path.parent}"
    if path.suffix in TEXT:
        return f"{path}: holds no tensors; name the model's directory ({path.parent}) or a .safetensors file"
    if size == 0:
        return f"{path}: is empty (0 bytes): the file was truncated; fetch it again"
    if start.startswith(b"PK\x03\x04"):
        if path.suffix in {".npz", ".zip"}:
            what = "NumPy archive" if path.suffix == ".npz" else "zip archive"
            return f"{path}: is a {what}, not safetensors; name a model directory or a .safetensors file"
        return f"{path}: {PICKLE}"
    told = next((told for begin, told in BEGINS if start.startswith(begin)), None)
    if told is None and path.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
        told = PICKLE
    return f"{path}: {told}" if told else None

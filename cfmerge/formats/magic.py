"""What a file is, by its first bytes: a format that is read, or the message about one that is not, and the way out."""

from pathlib import Path

CONVERT = "AutoModel.from_pretrained(DIR).save_pretrained(OUT)"
LFS = b"version https://git-lfs"
TORCH_BEFORE_1_6 = bytes.fromhex("80 02 8a 0a 6c fc 9c 46 f9 20 6a a8 50 19")  # a pickle of its magic number
ZIP = b"PK\x03\x04"
GGUF = (
    "is a GGUF file, quantised for llama.cpp; merge the model that it was made from, or turn it back with "
    "transformers: AutoModelForCausalLM.from_pretrained(DIR, gguf_file=NAME).save_pretrained(OUT)"
)
HDF5 = (
    "is an HDF5 file (TensorFlow or Keras); convert it with transformers 4 and TensorFlow: "
    "AutoModel.from_pretrained(DIR, from_tf=True).save_pretrained(OUT)"
)
PICKLE = "is a Python pickle that torch.save did not write; load it where it was made, and save its tensors"
ARCHIVE = "is an archive; unpack it, and name the directory that it held"
BEGINS = (  # (first bytes, what the file is and the way out)
    (b"GGUF", GGUF),
    (b"\x89HDF", HDF5),
    (b"\x93NUMPY", "is a NumPy array, not a model; name a model directory or a file of named tensors"),
    (b"\x80\x02", PICKLE),
    (b"\x80\x03", PICKLE),
    (b"\x80\x04", PICKLE),
    (b"\x80\x05", PICKLE),
    (b"\x1f\x8b", ARCHIVE),
    (b"BZh", ARCHIVE),
    (b"\xfd7zXZ", ARCHIVE),
    (b"\x28\xb5\x2f\xfd", ARCHIVE),
)
TAR = (257, b"ustar")
TEXT = {".json", ".md", ".txt", ".yaml", ".yml", ".model", ".py", ".jinja"}
LOOKED_AT = 512  # bytes


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


def format_of(path: Path) -> str:
    """The format of a file that `wrong_file` has nothing to say of: a key of `containers.FORMATS`."""
    start = _start(path)
    if _is_safetensors(start, path.stat().st_size, path):
        return "safetensors"
    if start.startswith(TORCH_BEFORE_1_6):
        return "torch"
    if start.startswith(ZIP):
        return "npz" if _begins_with_an_array(start) or path.suffix == ".npz" else "torch"
    is_map = start[:1] and (0x80 <= start[0] <= 0x8F or start[0] in {0xDE, 0xDF})
    if is_map and path.suffix != ".safetensors":
        return "msgpack"
    return "torch" if path.suffix in {".bin", ".pt", ".pth", ".ckpt"} else "safetensors"


def wrong_file(path: Path) -> str | None:
    """The message about a file that certainly holds no named tensors of a format that is read; None if it may."""
    start, size = _start(path), path.stat().st_size
    if start.startswith(LFS):
        return lfs_advice(path)
    if path.name.endswith(".index.json"):
        return f"{path}: is an index of shards; name the directory that it lies in: {path.parent}"
    if path.suffix in TEXT:
        return f"{path}: holds no tensors; name the model's directory ({path.parent}) or a file of tensors"
    if size == 0:
        return f"{path}: is empty (0 bytes): the file was truncated; fetch it again"
    if _is_safetensors(start, size, path) or start.startswith(TORCH_BEFORE_1_6):
        return None
    if start[TAR[0] :].startswith(TAR[1]):
        old = path.suffix in {".pt", ".pth", ".bin", ".ckpt"}
        return f"{path}: " + (
            "is a tar file of PyTorch before 0.1.10; load it with torch, and torch.save it" if old else ARCHIVE
        )
    told = next((told for begin, told in BEGINS if start.startswith(begin)), None)
    return f"{path}: {told}" if told else None


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LOOKED_AT)


def _is_safetensors(start: bytes, size: int, path: Path) -> bool:
    """Whether it begins as safetensors do: the length of a header may look like the first bytes of a pickle."""
    return start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size and path.suffix not in TEXT


def _begins_with_an_array(start: bytes) -> bool:
    """Whether the first member of a zip archive is a NumPy array; that of PyTorch's is NAME/data.pkl."""
    length = int.from_bytes(start[26:28], "little")
    return start[30 : 30 + length].endswith(b".npy")

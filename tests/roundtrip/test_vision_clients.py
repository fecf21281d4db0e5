"""timm and open_clip load what is merged. They need torchvision, which may not live beside the torch of these tests:
an environment of their own, made once in `$XDG_CACHE_HOME/cfmerge-tests`."""

import os
import subprocess
import venv
from pathlib import Path

import pytest

import cfmerge

pytestmark = pytest.mark.long

MAKE = """
import sys, torch, timm, open_clip
from safetensors.torch import save_file
kind, name, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
def model(seed):
    torch.manual_seed(0)
    if kind == "timm":
        made = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=3, num_classes=5)
    else:
        seen = dict(image_size=32, patch_size=16, width=16, layers=1, head_width=8)
        read = dict(context_length=8, vocab_size=20, width=16, heads=2, layers=1)
        made = open_clip.CLIP(embed_dim=8, vision_cfg=seen, text_cfg=read)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made
"""
SAVE = (
    MAKE
    + """
state = {key: value.contiguous() for key, value in model(seed).state_dict().items()}
save_file(state, name) if name.endswith("safetensors") else torch.save(state, name)
"""
)
LOAD = (
    MAKE
    + """
merged = model(0)
if kind == "timm":
    timm.models.load_checkpoint(merged, name, strict=True)
else:
    open_clip.load_checkpoint(merged, name, strict=True)
experts = [model(seed).state_dict() for seed in (1, 2)]
for key, found in merged.state_dict().items():
    mean = (experts[0][key] + experts[1][key]) / 2 if found.is_floating_point() else experts[0][key]
    torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)
"""
)
FILES = {
    "timm, safetensors": ("timm", "model.safetensors"),
    "timm, PyTorch": ("timm", "pytorch_model.bin"),
    "open_clip, safetensors": ("open_clip", "open_clip_model.safetensors"),
    "open_clip, PyTorch": ("open_clip", "open_clip_pytorch_model.bin"),
}


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of the environment."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cfmerge-tests" / "vision-clients"
    found = cache / "bin" / "python"
    if not (cache / "complete").exists():
        venv.create(cache, with_pip=True, clear=True)
        installed = subprocess.run([found, "-m", "pip", "install", "-q", "timm", "open_clip_torch"])
        if installed.returncode:
            pytest.skip("timm and open_clip could not be installed")
        (cache / "complete").touch()
    return found


@pytest.mark.parametrize("case", FILES)
def test_a_vision_client_loads_the_merged_file(tmp_path, python, case):
    kind, file = FILES[case]
    paths = [tmp_path / name / file for name in "bcd"]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        subprocess.run([python, "-c", SAVE, kind, path, str(seed)], check=True)
    cfmerge.merge(paths[0].parent, [path.parent for path in paths[1:]], "average", output=tmp_path / "out")
    merged = tmp_path / "out" / file
    assert merged.is_file()
    subprocess.run([python, "-c", LOAD, kind, merged, "0"], check=True)

"""Letters drawn from the font faces that ship in matplotlib; test faces are ones that training never saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

SIZE = 28
UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LOWER = "abcdefghijklmnopqrstuvwxyz"

TRAIN_FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmmi10"),
)
VALIDATION_FACES = ("DejaVuSansMono-Oblique", "cmti10")
TEST_FACES = ("DejaVuSans-Oblique", "DejaVuSerif-Bold", "STIXGeneralItalic", "cmss10", "cmtt10")


def face_path(face: str) -> Path:
    """Where matplotlib keeps a face."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


def render(
    characters: str, faces: Sequence[str], copies: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws every character in every face `copies` times, each copy distorted at random.

    Returns images `(len(faces) * len(characters) * copies, 28, 28)` uint8, white on black, and labels (the
    position in `characters`).
    """
    from PIL import Image, ImageDraw, ImageFont

    images, labels = [], []
    canvas = 4 * SIZE  # drawn large and shrunk, for smooth edges
    centre = canvas / 2, canvas / 2
    for face in faces:
        font = ImageFont.truetype(str(face_path(face)), size=80)
        for label, character in enumerate(characters):
            drawing = Image.new("L", (canvas, canvas), 0)
            ImageDraw.Draw(drawing).text(centre, character, fill=255, font=font, anchor="mm")
            for _ in range(copies):
                warp = _distortion(canvas, generator)
                warped = drawing.transform(
                    drawing.size, Image.Transform.AFFINE, warp, resample=Image.Resampling.BILINEAR
                )
                images.append(np.asarray(warped.resize((SIZE, SIZE), Image.Resampling.BOX)))
                labels.append(label)
    return np.stack(images), np.asarray(labels, np.int32)


def _distortion(canvas: int, generator: np.random.Generator) -> tuple[float, ...]:
    """Rotation, shear, scale and shift about the centre, as Pillow wants it (output pixel -> input pixel)."""
    angle, shear = generator.uniform(-0.25, 0.25, size=2)
    scale = generator.uniform(0.75, 1.25, size=2)
    shift = generator.uniform(-0.08, 0.08, size=2) * canvas
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.array([[1.0, shear], [0.0, 1.0]]) / scale[:, None]
    centre = np.full(2, canvas / 2)
    offset = centre - matrix @ (centre + shift)
    return (*matrix[0], offset[0], *matrix[1], offset[1])

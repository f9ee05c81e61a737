"""A traffic sign to recognise: a give-way sign drawn as a camera crop would show it.

Drawn rather than photographed because no freely packaged sign photograph was found. The drawing
is smoothed, shaded and noisy, but it is a drawing, and the demonstration's output says so.
"""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64


def draw_yield_sign(seed: int = 7) -> bytes:
    """Return a PNG of SIZE x SIZE pixels: a red-bordered white triangle, point down."""
    canvas = Image.new("RGB", (SIZE * 4, SIZE * 4), (96, 116, 104))
    draw = ImageDraw.Draw(canvas)
    draw.polygon([(16, 30), (240, 30), (128, 230)], fill=(178, 32, 42))
    draw.polygon([(58, 56), (198, 56), (128, 180)], fill=(226, 224, 218))
    small = canvas.rotate(3, resample=Image.Resampling.BICUBIC, fillcolor=(96, 116, 104))
    small = small.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    small = small.filter(ImageFilter.GaussianBlur(0.8))
    return _png(_camera_noise(np.asarray(small), seed))


def _camera_noise(pixels: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0.0, 4.0, pixels.shape)
    shade = np.linspace(1.0, 0.8, pixels.shape[0])[:, None, None]
    return np.clip(pixels * shade + noise, 0, 255).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()

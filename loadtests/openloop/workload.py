"""What is sent: sizes and lengths, and payloads made from them and a seed.

Knows pictures and words; knows no service.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

_WORDS = [
    "road",
    "sign",
    "river",
    "bridge",
    "engine",
    "window",
    "garden",
    "market",
    "winter",
    "number",
    "letter",
    "signal",
    "station",
    "kitchen",
    "mountain",
    "paper",
    "metal",
    "colour",
    "answer",
    "question",
    "morning",
    "evening",
]
_MAX_SIDE = 8192


@dataclass(frozen=True)
class Workload:
    """Sizes of the requests; each driver reads the fields it needs.

    Pictures are `image_width` x `image_height` pixels, `num_images` different ones in turn;
    prompts have `prompt_words` words and differ from request to request. `keyframe_interval` 1 has
    key frames only, 0 what the server does by itself.
    """

    model: str = ""
    image_width: int = 640
    image_height: int = 384
    num_images: int = 4
    num_streams: int = 1
    max_age_ms: int = 0
    keyframe_interval: int = 0
    prompt_words: int = 24
    max_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("image_width", "image_height"):
            if not 0 < getattr(self, name) <= _MAX_SIDE:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 to {_MAX_SIDE} pixels")
        for name in ("num_images", "num_streams", "prompt_words", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.max_age_ms < 0:
            raise ValueError(f"max_age_ms is {self.max_age_ms}; give 0 (never drop) or more")
        if self.keyframe_interval < 0:
            raise ValueError(f"keyframe_interval is {self.keyframe_interval}; give 0 or more")

    def images(self) -> list[bytes]:
        """JPEG files of smooth shapes under noise: natural enough to compress like photographs."""
        return [self._image(index) for index in range(self.num_images)]

    def prompt(self, index: int) -> str:
        """The text of request number `index`."""
        words = random.Random(f"{self.seed}-{index}").choices(_WORDS, k=self.prompt_words)
        return f"Tell a short story with these words: {' '.join(words)}."

    def _image(self, index: int) -> bytes:
        generator = np.random.default_rng((self.seed, index))
        coarse = generator.integers(0, 256, (6, 10, 3), dtype=np.uint8)
        size = (self.image_width, self.image_height)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        noisy = smooth + generator.normal(0.0, 6.0, smooth.shape)
        buffer = io.BytesIO()
        picture = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        picture.save(buffer, format="JPEG", quality=90)
        return buffer.getvalue()

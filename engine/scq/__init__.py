"""Soft Convex Quantization: images to a few hundred bytes of codes, and back.

Knows nothing of gRPC, HTTP, protobuf or the environment, and never imports vqllm. The names
below are the public surface; modules hold the rest.
"""

from __future__ import annotations

from scq.codec import CodecRegistry, EncodedFrame, FrameCodec, FrameStats, Label
from scq.errors import ScqError
from scq.layer import SCQLayer, SCQStats

__all__ = [
    "CodecRegistry",
    "EncodedFrame",
    "FrameCodec",
    "FrameStats",
    "Label",
    "SCQLayer",
    "SCQStats",
    "ScqError",
]

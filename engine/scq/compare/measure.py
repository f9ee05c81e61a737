"""One operating point over a set of pictures: bytes, quality, recognition, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scq.compare.points import OperatingPoint
from scq.compare.recognizers import Recognizer, same_shape_groups
from scq.data import ImageSet
from scq.features import FeatureExtractor, PictureFeatures, feature_distance
from scq.images import Pixels
from scq.metrics import psnr_db, similarities


@dataclass(frozen=True)
class PointResult:
    """What one codec does at one setting, over `n` pictures.

    mean_bytes: of whole files or frames. bpp: 8 * all bytes over all pixels. psnr_db, ssim,
    ms_ssim, feature_distance: means over pictures. decoded_right: pictures that the independent
    recognizer names rightly after decoding; codes_right: that our head names rightly from the
    bytes. Both None where not measured. encode_ms, decode_ms: medians over pictures, one thread.
    """

    codec: str
    setting: str
    n: int
    mean_bytes: float
    bpp: float
    psnr_db: float
    ssim: float
    ms_ssim: float
    feature_distance: float | None
    decoded_right: int | None
    codes_right: int | None
    encode_ms: float
    decode_ms: float

    @property
    def decoded_accuracy(self) -> float | None:
        """Share of pictures that the independent recognizer names rightly."""
        return None if self.decoded_right is None else self.decoded_right / self.n

    @property
    def codes_accuracy(self) -> float | None:
        """Share of pictures that our head names rightly from the bytes."""
        return None if self.codes_right is None else self.codes_right / self.n


class Judge:
    """Looks at decoded pictures: quality against the originals, and their classes.

    Features of the originals are worked out once.
    """

    def __init__(
        self,
        originals: ImageSet,
        extractor: FeatureExtractor | None,
        recognizer: Recognizer | None,
    ) -> None:
        self.originals = originals
        self._extractor = extractor
        self._recognizer = recognizer if originals.labels else None
        self._groups = same_shape_groups(originals.images)
        self._features = self._extract(originals.images)

    def originals_right(self) -> int | None:
        """How many originals the recognizer names rightly."""
        return self._right(self.originals.images, self._features)

    def quality(self, decoded: Sequence[Pixels]) -> dict[str, float | int | None]:
        """The quality fields of a `PointResult`."""
        pairs = list(zip(self.originals.images, decoded, strict=True))
        similar = [
            value for group in self._groups for value in similarities([pairs[i] for i in group])
        ]
        features = self._extract(decoded)
        return {
            "psnr_db": float(np.mean([psnr_db(*pair) for pair in pairs])),
            "ssim": float(np.mean([value.ssim for value in similar])),
            "ms_ssim": float(np.mean([value.ms_ssim for value in similar])),
            "feature_distance": self._distance(features),
            "decoded_right": self._right(decoded, features),
        }

    def _extract(self, pictures: Sequence[Pixels]) -> list[PictureFeatures]:
        if self._extractor is None:
            return []
        found: dict[int, PictureFeatures] = {}
        for group in self._groups:
            features = self._extractor.extract([pictures[i] for i in group])
            found.update(zip(group, features, strict=True))
        return [found[i] for i in range(len(pictures))]

    def _distance(self, features: list[PictureFeatures]) -> float | None:
        if not features:
            return None
        pairs = zip(self._features, features, strict=True)
        return float(np.mean([feature_distance(*pair) for pair in pairs]))

    def _right(self, pictures: Sequence[Pixels], features: list[PictureFeatures]) -> int | None:
        if self._recognizer is None:
            return None
        named: list[int] = []
        for start in range(0, len(pictures), 256):
            part = slice(start, start + 256)
            named += self._recognizer.classify(pictures[part], features[part])
        return sum(a == b for a, b in zip(named, self.originals.labels, strict=True))


def measure(point: OperatingPoint, judge: Judge) -> PointResult:
    """Code and decode every original at this point, and judge what comes back."""
    originals = judge.originals
    codes, decoded, times = [], [], []
    for image in originals.images:
        started = time.perf_counter()
        coded = point.encode(image)
        encoded_at = time.perf_counter()
        decoded.append(point.decode(coded))
        times.append((encoded_at - started, time.perf_counter() - encoded_at))
        codes.append(coded)
    encode_ms, decode_ms = (1000 * np.median(times, axis=0)).tolist()
    total = sum(map(len, codes))
    quality: dict[str, float | int | None] = judge.quality(decoded)
    return PointResult(
        codec=point.codec,
        setting=point.setting,
        n=len(codes),
        mean_bytes=total / len(codes),
        bpp=8 * total / sum(image.shape[0] * image.shape[1] for image in originals.images),
        codes_right=_codes_right(point, codes, originals.labels),
        encode_ms=encode_ms,
        decode_ms=decode_ms,
        **quality,  # type: ignore[arg-type]
    )


def _codes_right(
    point: OperatingPoint, codes: Sequence[bytes], labels: Sequence[int]
) -> int | None:
    if not labels or point.recognize(codes[0]) is None:
        return None
    return sum(point.recognize(c) == label for c, label in zip(codes, labels, strict=True))

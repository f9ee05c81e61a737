"""Pictures for choosing int8 ranges, in the form ONNX Runtime's quantizer asks for.

Knows pictures and canvases; nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scq.errors import ScqError
from scq.images import Pixels, fit_frame
from scq.model import ModelConfig


@dataclass(frozen=True)
class ImagesForCalibration:
    """Pictures (H, W, 3) uint8 like those the phone will see; 20 to 200 of them do.

    Raises ScqError when there are none.
    """

    images: Sequence[Pixels]

    def __post_init__(self) -> None:
        if not self.images:
            raise ScqError("int8 export needs calibration pictures; give --calibration PATH")

    def feeds(self, config: ModelConfig) -> list[dict[str, Any]]:
        """One input of the encoder graph per picture."""
        return [{"image": fit_frame(image, config)[0].numpy()} for image in self.images]

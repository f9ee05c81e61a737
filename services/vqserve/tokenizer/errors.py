"""What can go wrong in tokenizerd, each with the reason that clients see.

gRPC code and HTTP status come from the parents in `vqserve.common.errors`.
"""

from __future__ import annotations

from vqserve.common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound


class EmptyPayload(InvalidArgument):
    """A request without the bytes that it is about."""

    reason = "EMPTY_PAYLOAD"


class InvalidImage(InvalidArgument):
    """Bytes that are no usable picture."""

    reason = "INVALID_IMAGE"


class ImageTooLarge(InvalidArgument):
    """More pixels than the limit, found in the header before anything was decoded."""

    reason = "IMAGE_TOO_LARGE"


class CorruptCodes(InvalidArgument):
    """Bytes that are no SCQ1 frame, or one that was damaged."""

    reason = "CORRUPT_CODES"


class ReferenceMismatch(InvalidArgument):
    """A delta frame whose reference is not the frame that was decoded last."""

    reason = "REFERENCE_MISMATCH"


class InvalidLatents(InvalidArgument):
    """The encoder made latents that cannot be quantized (NaN or infinity)."""

    reason = "INVALID_LATENTS"


class InvalidModel(InvalidArgument):
    """A file that is no readable model, or a name that cannot be served."""

    reason = "INVALID_MODEL"


class ModelMismatch(InvalidArgument):
    """The request names one model and its codes another."""

    reason = "MODEL_MISMATCH"


class InvalidStream(InvalidArgument):
    """Messages of a frame stream in the wrong order or of the wrong kind."""

    reason = "INVALID_STREAM"


class ArtifactsTooLarge(InvalidArgument):
    """More bytes of artifacts than one message may carry."""

    reason = "ARTIFACTS_TOO_LARGE"


class UnknownArtifact(NotFound):
    """The model has no file of this name."""

    reason = "UNKNOWN_ARTIFACT"


class UnknownModel(NotFound):
    """No loaded model has this name or made these codes."""

    reason = "UNKNOWN_MODEL"


class NoRecognitionHead(FailedPrecondition):
    """The model turns frames into codes but was not trained to label them."""

    reason = "NO_RECOGNITION_HEAD"


class NoEntropyTables(FailedPrecondition):
    """The model's codes can be written RAW only."""

    reason = "NO_ENTROPY_TABLES"


class ModelHashMismatch(FailedPrecondition):
    """The client holds another version of the model than the server."""

    reason = "MODEL_HASH_MISMATCH"


class ModelNameTaken(AlreadyExists):
    """Another loaded model has this name."""

    reason = "MODEL_NAME_TAKEN"


class LastModel(FailedPrecondition):
    """Unloading it would leave nothing to serve."""

    reason = "LAST_MODEL"

"""The walk through both services: what is asked, and what came back.

Talks to the services through `vqclient` only.
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from demo.pictures import Photograph
from demo.side_by_side import Panel, nearest_jpeg, psnr_db
from demo.sign import draw_yield_sign
from vqclient import GenerationClient, Message, Recognized, Sampling, TokenizerClient, Usage

ANSWER_TOKENS = 96


@dataclass(frozen=True)
class FrameReport:
    """One photograph after its way through the tokenizer service.

    Sizes in bytes, times in milliseconds as the client saw them.
    """

    subject: str
    model: str
    width: int
    height: int
    source_bytes: int
    coded_bytes: int
    bpp: float
    psnr_db: float
    encode_ms: float
    decode_ms: float
    jpeg_bytes: int
    jpeg_psnr_db: float
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Answer:
    """The language model's answer and its timing."""

    text: str
    usage: Usage

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first token."""
        seconds = self.usage.total - self.usage.time_to_first_token
        return (self.usage.completion_tokens - 1) / seconds if seconds > 0 else 0.0


async def send_frame(client: TokenizerClient, photograph: Photograph) -> FrameReport:
    """Encode and decode one photograph and compare it with JPEG near the same size."""
    source = photograph.path.read_bytes()
    await client.encode(source, model=photograph.model)  # the first call warms the model up
    started = time.perf_counter()
    encoded = await client.encode(source, model=photograph.model)
    encode_ms = 1000 * (time.perf_counter() - started)
    started = time.perf_counter()
    decoded = await client.decode(encoded.codes)
    decode_ms = 1000 * (time.perf_counter() - started)

    original = Image.open(io.BytesIO(source)).convert("RGB")
    reconstruction = Image.open(io.BytesIO(decoded.image)).convert("RGB")
    jpeg = nearest_jpeg(original, len(encoded.codes))
    jpeg_image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    return FrameReport(
        subject=photograph.subject,
        model=encoded.model,
        width=encoded.width,
        height=encoded.height,
        source_bytes=len(source),
        coded_bytes=len(encoded.codes),
        bpp=encoded.bpp,
        psnr_db=psnr_db(original, reconstruction),
        encode_ms=encode_ms,
        decode_ms=decode_ms,
        jpeg_bytes=len(jpeg),
        jpeg_psnr_db=psnr_db(original, jpeg_image),
        panels=(
            Panel(original, f"original, {len(source):,} bytes"),
            Panel(
                reconstruction, f"SCQ codes, {len(encoded.codes):,} bytes, {encoded.bpp:.3f} bpp"
            ),
            Panel(jpeg_image, f"smallest JPEG near it, {len(jpeg):,} bytes"),
        ),
    )


async def recognize_sign(client: TokenizerClient) -> Recognized:
    """Recognise the drawn sign from its codes, as a phone would send them."""
    encoded = await client.encode(draw_yield_sign(), model="sign32")
    return await client.recognize(codes=encoded.codes, top_k=3)


async def recognize_dish(client: TokenizerClient, photograph: Photograph) -> Recognized:
    """Recognise the dish of a food photograph from its codes."""
    encoded = await client.encode(photograph.path.read_bytes(), model="food")
    return await client.recognize(codes=encoded.codes, top_k=3)


async def ask(client: GenerationClient, question: str, show: Callable[[str], None]) -> Answer:
    """Ask the language model, showing the text as it arrives."""
    pieces: list[str] = []
    # A small model that always takes the likeliest word goes round in circles.
    sampling = Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0, frequency_penalty=0.3)
    usage: Usage | None = None
    async for piece in client.chat([Message("user", question)], sampling=sampling):
        pieces.append(piece.text)
        show(piece.text)
        usage = piece.usage or usage
    if usage is None:
        raise RuntimeError("the last message of a generation carries its usage")
    return Answer("".join(pieces), usage)

"""A model's networks between pixels and latents, as the codec runs them for one frame at a time.

`PackedNetworks` gives what `ModelNetworks`, the plain torch modules, gives up to rounding, in about
half the time on a CPU: weights lie in oneDNN's order from the start, activations and residual
additions happen inside the convolutions, and pixels are gathered to patches as bytes. Knows
pictures of whole strides only: nothing of codes, placement or files.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from scq.backbones import ResidualBlock
from scq.images import Pixels, to_planes
from scq.model import ScqAutoencoder

_Step = Callable[[Tensor], Tensor]
_NO_STEP = [1, 1]
# Frames are of any size; weights are packed for this one, in pixels.
_FRAME_SIDE = 256
# Under about 150x150 pixels the library wants the encoder's weights in another order and moves
# them for every picture: 22 to 28 ms at 32x32 to 144x144 (nav); the plain modules take 1 to 3.
_LEAST_PIXELS = 160 * 160


class Networks(Protocol):
    """Encoder and decoder; safe to share between threads."""

    def latents(self, canvas: Pixels) -> Tensor:
        """Pixels (H, W, 3), sides multiples of the stride -> latents (1, h, w, F) float32."""
        ...

    def pixels(self, latents: Tensor) -> Pixels:
        """Latents (1, h, w, F) -> pixels (H, W, 3)."""
        ...


def make_networks(model: ScqAutoencoder) -> Networks:
    """Packed networks where the model and this machine have them, else the model's own.

    A CPU with bfloat16 products decodes in them: pictures differ by one level of 255 in a tenth of
    the samples, and by less than 0.001 dB. The encoder stays in float32: codes are the same
    everywhere, but for ties within rounding.
    """
    if not can_pack(model):
        return ModelNetworks(model)
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False)
    packed = PackedNetworks(model, decoder_dtype=torch.bfloat16 if fast else torch.float32)
    return packed if model.config.kind == "crop" else NetworksBySize(packed, ModelNetworks(model))


def can_pack(model: ScqAutoencoder) -> bool:
    """Whether `PackedNetworks` runs this model here: plain convolutions on an x86 CPU."""
    weights = model.quantizer.codebook
    return (
        weights.device.type == "cpu"
        and weights.dtype == torch.float32
        and (model.config.encoder_backbone, model.config.decoder_backbone) == ("cnn", "cnn")
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


class ModelNetworks:
    """The model's modules as they are."""

    def __init__(self, model: ScqAutoencoder) -> None:
        self._model = model

    @torch.inference_mode()
    def latents(self, canvas: Pixels) -> Tensor:
        """See `Networks`."""
        return self._model.encode(to_planes(canvas))

    @torch.inference_mode()
    def pixels(self, latents: Tensor) -> Pixels:
        """See `Networks`."""
        planes = self._model.decode(latents)[0]
        whole = planes.mul(255.0).round_().clamp_(0, 255).to(torch.uint8)
        pixels: Pixels = whole.permute(1, 2, 0).contiguous().numpy()
        return pixels


class NetworksBySize:
    """Packed networks, but for encoding pictures that are too small for how the weights lie."""

    def __init__(self, packed: Networks, plain: Networks) -> None:
        self._packed, self._plain = packed, plain

    def latents(self, canvas: Pixels) -> Tensor:
        """See `Networks`."""
        small = canvas.shape[0] * canvas.shape[1] < _LEAST_PIXELS
        return (self._plain if small else self._packed).latents(canvas)

    def pixels(self, latents: Tensor) -> Pixels:
        """See `Networks`."""
        return self._packed.pixels(latents)


class PackedNetworks:
    """The same networks of convolutions with packed weights; see `can_pack`.

    A copy: later changes of the model do not reach it. Convolutions compute in the dtypes given.
    """

    def __init__(
        self,
        model: ScqAutoencoder,
        encoder_dtype: torch.dtype = torch.float32,
        decoder_dtype: torch.dtype = torch.float32,
    ) -> None:
        config = model.config
        self._patch = config.patch
        self._dtypes = encoder_dtype, decoder_dtype
        side = config.max_height if config.kind == "crop" else _FRAME_SIDE
        with torch.inference_mode():
            self._encoder = _pack_encoder(
                model.encoder, self._patch, side // self._patch, encoder_dtype
            )
            self._decoder = _pack_decoder(
                model.decoder, self._patch, side // config.stride, decoder_dtype
            )

    @torch.inference_mode()
    def latents(self, canvas: Pixels) -> Tensor:
        """See `Networks`."""
        patches = _to_patches(torch.from_numpy(canvas), self._patch)
        # Rounded as float planes of 0..1 would be, so that both kinds of networks see one input.
        levels = patches.float().div_(255.0).mul_(2).sub_(1)
        hidden = levels.to(self._dtypes[0]).permute(0, 3, 1, 2)
        for step in self._encoder:
            hidden = step(hidden)
        return hidden.permute(0, 2, 3, 1).float().contiguous()

    @torch.inference_mode()
    def pixels(self, latents: Tensor) -> Pixels:
        """See `Networks`."""
        hidden = latents.to(self._dtypes[1]).permute(0, 3, 1, 2)
        for step in self._decoder:
            hidden = step(hidden)
        levels = hidden.permute(0, 2, 3, 1).float().contiguous().mul_(0.5).add_(0.5).clamp_(0, 1)
        patches = levels.mul_(255.0).round_().to(torch.uint8)
        pixels: Pixels = _from_patches(patches, self._patch).numpy()
        return pixels


def _to_patches(pixels: Tensor, side: int) -> Tensor:
    """(H, W, 3) -> (1, H / side, W / side, side * side * 3), rows of a patch before its columns."""
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    parts = pixels.view(rows, side, columns, side, 3).permute(0, 2, 1, 3, 4)
    return parts.reshape(1, rows, columns, -1)


def _from_patches(patches: Tensor, side: int) -> Tensor:
    _, rows, columns, _ = patches.shape
    parts = patches.view(rows, columns, side, side, 3).permute(0, 2, 1, 3, 4)
    return parts.reshape(rows * side, columns * side, 3)


def _pack_encoder(encoder: nn.Module, patch: int, side: int, dtype: torch.dtype) -> list[_Step]:
    """Steps from gathered patches, `side` of them a row: a pixel-unshuffle is the reading order of
    the convolution."""
    steps: list[_Step] = []
    gathered = 0
    for layer in encoder.children():
        if isinstance(layer, nn.PixelUnshuffle):
            gathered = layer.downscale_factor
            continue
        if isinstance(layer, ResidualBlock):
            steps.append(_PackedBlock(layer, side, dtype))
            continue
        assert isinstance(layer, nn.Conv2d)
        weight = layer.weight
        if gathered and not steps:
            weight = _patch_order(weight, patch, dim=1)
        elif gathered:
            # 1x1 on 2x2 gathered pixels is 2x2 on the pixels, in steps of 2.
            weight = weight.reshape(weight.shape[0], -1, gathered, gathered)
        step = gathered if gathered and steps else 1
        steps.append(_PackedConv(weight, layer.bias, layer.padding, side, dtype, step=step))
        side //= step
        gathered = 0
    return steps


def _pack_decoder(decoder: nn.Module, patch: int, side: int, dtype: torch.dtype) -> list[_Step]:
    """Steps from latents, `side` a row, to patches: the last pixel-shuffle is `_from_patches`."""
    steps: list[_Step] = []
    layers = list(decoder.children())[:-1]
    for layer in layers:
        if isinstance(layer, nn.PixelShuffle):
            steps.append(layer)
            side *= layer.upscale_factor
        elif isinstance(layer, ResidualBlock):
            steps.append(_PackedBlock(layer, side, dtype))
        else:
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            weight, bias = layer.weight, layer.bias
            if layer is layers[-1]:
                weight = _patch_order(weight, patch, dim=0)
                bias = _patch_order(bias, patch, dim=0)
            steps.append(_PackedConv(weight, bias, layer.padding, side, dtype))
    return steps


def _patch_order(tensor: Tensor, side: int, dim: int) -> Tensor:
    """Channels (3, row, column) of a shuffle to the order of `_to_patches`, (row, column, 3)."""
    order = torch.arange(3 * side * side).view(3, side, side).permute(1, 2, 0).flatten()
    return tensor.index_select(dim, order)


class _PackedConv:
    """A convolution in oneDNN's order of weights, with what follows it.

    These operators are what torch's own compiler emits for a CPU; no public call reaches them.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        padding: Any,
        side: int,
        dtype: torch.dtype,
        *,
        step: int = 1,
        after: str = "none",
    ) -> None:
        self._padding, self._step, self._after = list(padding), [step, step], after
        self._bias = None if bias is None else bias.to(dtype)
        # Any size may follow, but at one far from `side` the library may reorder at every call.
        sample = [1, weight.shape[1], side, side]
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight.to(dtype), self._padding, self._step, _NO_STEP, 1, sample
        )

    def __call__(self, features: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            features, self._weight, self._bias, self._padding, self._step, _NO_STEP, 1,
            self._after, [], "",
        )  # fmt: skip
        return out

    def plus(self, features: Tensor, other: Tensor) -> Tensor:
        """The convolution of `features`, and `other` added to it."""
        out: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
            features, other, self._weight, self._bias, self._padding, self._step, _NO_STEP, 1,
            "add", 1.0, None, [], None,
        )  # fmt: skip
        return out


class _PackedBlock:
    """`ResidualBlock`: x + conv(silu(conv(silu(x))))."""

    def __init__(self, block: ResidualBlock, side: int, dtype: torch.dtype) -> None:
        first, second = (
            (layer.weight, layer.bias, layer.padding, side, dtype)
            for layer in (block.first, block.second)
        )
        self._first, self._second = _PackedConv(*first, after="swish"), _PackedConv(*second)

    def __call__(self, features: Tensor) -> Tensor:
        return self._second.plus(self._first(functional.silu(features)), features)

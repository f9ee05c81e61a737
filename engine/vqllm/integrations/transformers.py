"""Lets Hugging Face transformers load the folders that vqllm writes, on a CPU, without peers.

    import vqllm.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained("path/to/folder")

Packed linears are read by `vqllm.checkpoint`, with all of its checks, and dequantized once into the
model's dtype; rotations run as hooks. For GPTQ and VPTQ folders this takes the place of the usual
reader only where that one is not installed or has no GPU to run on; `register(replace=True)`
decides otherwise. Works with transformers 4.48 and later; 4.48 needs accelerate for any quantized
folder.
"""

from __future__ import annotations

import importlib.util
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.quantizers import auto as hf_auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from vqllm.checkpoint import EMBEDDING, HEAD, Checkpoint
from vqllm.errors import UnsupportedModel
from vqllm.integrations.transformers_experts import FusedExperts
from vqllm.outlier.transform import HadamardRotation, ModelTransform, rotation

_PEERS = {"gptq": ("gptqmodel", "auto_gptq"), "vptq": ("vptq",)}


class QuantMethod(str, Enum):  # noqa: UP042 - transformers compares with plain strings
    """The formats, as transformers wants them spelled."""

    GPTQ = "gptq"
    VPTQ = "vptq"
    VQSTACK = "vqstack"


class VqllmConfig(QuantizationConfigMixin):
    """The `quantization_config` of a folder as it stands in config.json."""

    def __init__(self, **fields: Any) -> None:
        # transformers' own enumeration has no member for us; it reads `.value` only.
        self.quant_method: Any = QuantMethod(fields.get("quant_method"))
        self.fields = fields

    def to_dict(self) -> dict[str, Any]:
        return dict(self.fields)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class DequantizedLinear(nn.Module):
    """A linear layer whose weight comes from the packed file and is no parameter."""

    weight: Tensor

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.bias = like.bias
        self.register_buffer("weight", None, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class VqllmQuantizer(HfQuantizer):
    """Builds the modules before, and fills them after transformers has loaded the plain tensors."""

    requires_calibration = True

    def __init__(self, quantization_config: VqllmConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checkpoint: Checkpoint | None = None
        self._linears: dict[str, DequantizedLinear] = {}
        self._experts = FusedExperts()
        self._packed: list[str] = []

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        checkpoint = Checkpoint(_folder_of(model, kwargs.get("checkpoint_files")))
        self._checkpoint = checkpoint
        assert checkpoint.quantization is not None
        for name in checkpoint.linear_names():
            if checkpoint.quantization.marker(name) in checkpoint.store:
                self._packed.append(name)
                if not self._experts.takes(model, name):
                    self._linears[name] = _replaced(model, name)
        self._silence(model, checkpoint)

    def _silence(self, model: Any, checkpoint: Checkpoint) -> None:
        """Tell transformers that the packed tensors are not its business."""
        tables = [name for name in (EMBEDDING, HEAD) if checkpoint.embedding_codes(name)]
        stems = [*self._packed, *(name.removesuffix(".weight") for name in tables)]
        unexpected = (rf"^{_escaped(stem)}\.(?!bias$|weight$)" for stem in stems)
        filled = [*tables, *self._experts.parameter_names]
        missing = (f"^{_escaped(name)}$" for name in filled)
        _ignore(model, "_keys_to_ignore_on_load_unexpected", set(unexpected))
        _ignore(model, "_keys_to_ignore_on_load_missing", set(missing))

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Tables in 8 bits are filled in afterwards."""
        assert self._checkpoint is not None
        return [key for key in missing_keys if not self._checkpoint.embedding_codes(key)]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._checkpoint is not None
        _fill_tables(model, self._checkpoint)
        like = model.get_input_embeddings().weight
        for name, module in self._linears.items():
            weight = torch.from_numpy(self._checkpoint.dense_linear(name))
            module.weight = weight.to(like.device, like.dtype)
        self._experts.fill(model, self._checkpoint, like)
        add_rotations(model, self._checkpoint.transform)
        return model

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Never: copy the folder instead, it is the packed form."""
        return False


def register(replace: bool | None = None) -> None:
    """Enter the formats in transformers' tables; importing this module does it once.

    `replace` decides about GPTQ and VPTQ folders: True reads them by vqllm, False leaves them to
    the usual reader, None does what works here.
    """
    methods = ["vqstack"]
    for method, peers in _PEERS.items():
        usable = torch.cuda.is_available() and any(map(importlib.util.find_spec, peers))
        if replace or (replace is None and not usable):
            methods.append(method)
    for method in methods:
        hf_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = VqllmConfig
        hf_auto.AUTO_QUANTIZER_MAPPING[method] = VqllmQuantizer


def add_rotations(model: Any, transform: ModelTransform) -> None:
    """Hook the rotations that are computed at run time into a transformers decoder."""
    decoder = model.get_decoder()
    if transform.residual_seed is not None:
        residual = rotation(model.config.hidden_size, transform.residual_seed)
        model.get_input_embeddings().register_forward_hook(_Turn(residual).after)
        decoder.norm.register_forward_pre_hook(_Turn(residual).back_before)
    if transform.down_seed is not None:
        for name, module in decoder.named_modules():
            if name.endswith("down_proj"):
                down = rotation(module.in_features, transform.down_seed)
                module.register_forward_pre_hook(_Turn(down).before)


class _Turn:
    """A rotation in the shapes that hooks have."""

    def __init__(self, turn: HadamardRotation) -> None:
        self._rotation = turn

    def after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._rotation.apply(output)

    def before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._rotation.apply(inputs[0]), *inputs[1:])

    def back_before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._rotation.invert(inputs[0]), *inputs[1:])


def _folder_of(model: Any, checkpoint_files: list[str] | None) -> Path:
    """The folder with the weights: a local one, or where transformers keeps a downloaded one."""
    if checkpoint_files:
        return Path(checkpoint_files[0]).parent
    name = str(model.config._name_or_path)
    if Path(name).is_dir():
        return Path(name)
    commit = getattr(model.config, "_commit_hash", None)
    found = cached_file(name, "config.json", revision=commit)
    return Path(str(found)).parent


def _replaced(model: Any, name: str) -> DequantizedLinear:
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
    except AttributeError:
        parent = None
    linear = getattr(parent, child, None)
    if not isinstance(linear, nn.Linear):
        raise UnsupportedModel(
            f"transformers {transformers.__version__} has no linear layer {name} in this model; "
            "use vqllm's own executors"
        )
    module = DequantizedLinear(linear)
    setattr(parent, child, module)
    return module


def _fill_tables(model: Any, checkpoint: Checkpoint) -> None:
    """Embedding and head where the folder keeps them in 8 bits."""
    if checkpoint.embedding_codes(EMBEDDING):
        _fill(model.get_input_embeddings(), checkpoint.embedding())
    if checkpoint.embedding_codes(HEAD):
        _fill(model.get_output_embeddings(), checkpoint.head())
    model.tie_weights()


def _fill(module: Any, values: NDArray[np.float32]) -> None:
    old = module.weight
    device = "cpu" if old.is_meta else old.device
    weight = torch.from_numpy(values).to(device, old.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)


def _ignore(model: Any, attribute: str, patterns: set[str]) -> None:
    """Add key patterns; older versions of transformers look at the class, newer at the model."""
    place = model if attribute in vars(model) else type(model)
    setattr(place, attribute, {*(getattr(place, attribute) or ()), *patterns})


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


register()

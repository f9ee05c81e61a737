"""The shape of a decoder: sizes, rotary embedding, attention kind, experts, linears by name.

Knows nothing of files; `vqllm.model_config` makes these from a config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LinearGroup = tuple[str, ...]

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary frequencies as transformers spells them; unused fields keep their defaults.

    Attributes:
        kind: one of `ROPE_KINDS`.
        theta: base of the frequencies.
        factor: stretch of the context.
        original_length: positions the model was trained on before stretching.
        low_freq_factor, high_freq_factor: llama3's band limits.
        beta_fast, beta_slow: yarn's band limits, in rotations over `original_length`.
        truncate: whether yarn rounds its band to whole dimensions.
        mscale, mscale_all_dim: yarn's magnitude terms as DeepSeek uses them; 0 is "not given".
        attention_factor: given factor of cosines and sines; None derives it.
        short_factor, long_factor: longrope's stretch per frequency.
        interleaved: whether elements 2 i and 2 i + 1 are a pair (DeepSeek), not i and i + n / 2.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    interleaved: bool = False


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Attributes:
        q_rank: width of the query latent; None projects queries directly.
        kv_rank: width of the latent that keys and values share.
        nope_dim, rope_dim: query and key elements per head without and with position.
        value_dim: value elements per head.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True)
class MoeConfig:
    """Routed and shared experts (DeepSeekMoE).

    Attributes:
        num_experts: routed experts of a block.
        top_k: experts per token.
        intermediate_size: inner width of one routed expert.
        shared_size: inner width of the shared experts together; 0 is none.
        first_layer: blocks before this one have an ordinary MLP.
        scoring: "softmax" (V2) or "sigmoid" (V3: a learnt bias takes part in the choice only).
        num_groups, top_groups: experts stand in groups, and only the best groups are open; 1, 1
            is no limit. A group's score is its best expert (softmax) or its two best (sigmoid).
        normalize: whether the chosen scores are divided by their sum.
        scale: factor of the routed experts' output.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_size: int
    first_layer: int
    scoring: str = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    normalize: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; names as in Hugging Face configs, except `context_length`.

    Attributes:
        head_dim: elements of a query head; with `mla` its rotary part, as transformers has it.
        rope_theta: base of the rotary frequencies, the same as `rope.theta`.
        biases: linears that have a bias, in every block that has the linear.
        sliding_window: positions that a windowed block sees, its own included; None is all.
        window_layers: blocks with the window, where there is one.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    rope: RopeConfig = field(default_factory=RopeConfig)
    biases: tuple[str, ...] = ()
    sliding_window: int | None = None
    window_layers: frozenset[int] = frozenset()
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None

    @property
    def features(self) -> frozenset[str]:
        """What this model needs beyond a plain llama, for executors that cannot do all of it."""
        found = {
            "biases": bool(self.biases),
            f"{self.rope.kind} rope scaling": self.rope.kind != "default",
            "a sliding window": bool(self.window_layers),
            "latent attention": self.mla is not None,
            "experts": self.moe is not None,
        }
        return frozenset(name for name, is_there in found.items() if is_there)

    @property
    def value_dim(self) -> int:
        """Elements of one head's value."""
        return self.head_dim if self.mla is None else self.mla.value_dim

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that carry the position."""
        return self.head_dim if self.mla is None else self.mla.rope_dim

    def window(self, layer: int) -> int | None:
        """Positions that the attention of one block sees; None is all."""
        return self.sliding_window if layer in self.window_layers else None

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.first_layer

    def linear_groups(self, layer: int) -> tuple[LinearGroup, ...]:
        """The block's linears in execution order; those of one group read the same input."""
        return (*self._attention_groups(), ("self_attn.o_proj",), *self._mlp_groups(layer))

    def linear_shapes(self, layer: int = 0) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of one block's linears by name, in execution order."""
        return {part: self._shape(part) for group in self.linear_groups(layer) for part in group}

    def linear_names(self) -> list[str]:
        """Full names of all decoder linears, in execution order."""
        return [
            f"model.layers.{layer}.{part}"
            for layer in range(self.num_layers)
            for part in self.linear_shapes(layer)
        ]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear by its full name; KeyError for what cannot be one."""
        parts = name.split(".", 3)
        if parts[:2] != ["model", "layers"] or len(parts) < 4:
            raise KeyError(name)
        return self._shape(parts[3])

    def bias_parts(self, layer: int) -> tuple[str, ...]:
        """Linears of one block that have a bias."""
        return tuple(part for part in self.linear_shapes(layer) if part in self.biases)

    def inner_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Tensors of one block besides linears, biases and the two norms: name to shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.mla is not None and self.mla.q_rank is not None:
            shapes["self_attn.q_a_layernorm.weight"] = (self.mla.q_rank,)
        if self.mla is not None:
            shapes["self_attn.kv_a_layernorm.weight"] = (self.mla.kv_rank,)
        if self.moe is not None and self.has_experts(layer):
            shapes["mlp.gate.weight"] = (self.moe.num_experts, self.hidden_size)
            if self.moe.scoring == "sigmoid":
                shapes["mlp.gate.e_score_correction_bias"] = (self.moe.num_experts,)
        return shapes

    @property
    def num_linear_parameters(self) -> int:
        """Weights of all decoder linears, without embedding, head and norms."""
        return sum(
            rows * columns
            for layer in range(self.num_layers)
            for rows, columns in self.linear_shapes(layer).values()
        )

    @property
    def num_parameters(self) -> int:
        """All weights; a tied head counts once."""
        tables = 1 if self.tie_word_embeddings else 2
        outside = tables * self.vocab_size * self.hidden_size + self.hidden_size
        small = sum(self._num_small(layer) for layer in range(self.num_layers))
        return self.num_linear_parameters + outside + small

    def _num_small(self, layer: int) -> int:
        """Weights of one block that are not of a linear: norms, biases, router."""
        shapes = self.linear_shapes(layer)
        biases = sum(shapes[part][0] for part in self.bias_parts(layer))
        inner = sum(
            size[0] * (size[1] if len(size) > 1 else 1)
            for size in self.inner_shapes(layer).values()
        )
        return 2 * self.hidden_size + biases + inner

    def _attention_groups(self) -> tuple[LinearGroup, ...]:
        if self.mla is None:
            return (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),)
        if self.mla.q_rank is None:
            return (
                ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"),
                ("self_attn.kv_b_proj",),
            )
        return (
            ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
            ("self_attn.q_b_proj",),
            ("self_attn.kv_b_proj",),
        )

    def _mlp_groups(self, layer: int) -> tuple[LinearGroup, ...]:
        if self.moe is None or not self.has_experts(layer):
            return mlp_groups("mlp")
        shared = mlp_groups("mlp.shared_experts") if self.moe.shared_size else ()
        routed = (mlp_groups(f"mlp.experts.{index}") for index in range(self.moe.num_experts))
        return (*shared, *(group for groups in routed for group in groups))

    def _shape(self, part: str) -> tuple[int, int]:
        if part.startswith("self_attn."):
            shapes = self._llama_shapes() if self.mla is None else self._mla_shapes(self.mla)
            return shapes[part.removeprefix("self_attn.")]
        if not part.endswith(("gate_proj", "up_proj", "down_proj")):
            raise KeyError(part)
        inner = self._inner_size(part)
        return (
            (self.hidden_size, inner) if part.endswith("down_proj") else (inner, self.hidden_size)
        )

    def _inner_size(self, part: str) -> int:
        if self.moe is not None and ".experts." in part:
            return self.moe.intermediate_size
        if self.moe is not None and ".shared_experts." in part:
            return self.moe.shared_size
        return self.intermediate_size

    def _llama_shapes(self) -> dict[str, tuple[int, int]]:
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (query_size, self.hidden_size),
            "k_proj": (kv_size, self.hidden_size),
            "v_proj": (kv_size, self.hidden_size),
            "o_proj": (self.hidden_size, query_size),
        }

    def _mla_shapes(self, mla: MlaConfig) -> dict[str, tuple[int, int]]:
        queries = self.num_heads * mla.query_dim
        return {
            "q_proj": (queries, self.hidden_size),
            "q_a_proj": (mla.q_rank or 0, self.hidden_size),
            "q_b_proj": (queries, mla.q_rank or 0),
            "kv_a_proj_with_mqa": (mla.kv_rank + mla.rope_dim, self.hidden_size),
            "kv_b_proj": (self.num_heads * (mla.nope_dim + mla.value_dim), mla.kv_rank),
            "o_proj": (self.hidden_size, self.num_heads * mla.value_dim),
        }


def mlp_groups(prefix: str) -> tuple[LinearGroup, ...]:
    """The groups of a gated MLP whose linears lie under `prefix`."""
    return ((f"{prefix}.gate_proj", f"{prefix}.up_proj"), (f"{prefix}.down_proj",))

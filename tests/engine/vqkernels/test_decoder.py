"""The native decoder step against a plain numpy decoder, and against itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vqkernels import (
    DtypeError,
    NativeCallError,
    NonFiniteError,
    ShapeError,
    ThreadPool,
    forced_isa,
    supported_isas,
)
from vqkernels.decoder import (
    PHASES,
    DecodeBatch,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    DecoderWeights,
    Rotation,
    read_all,
)
from vqkernels.matrix import Matrix, aligned_empty
from vqkernels.matrix_weights import GridWeights, LayeredWeights, Transform

Floats = npt.NDArray[np.float32]

pytestmark = pytest.mark.usefixtures("native")

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, DIM = 96, 160, 50, 4, 2, 20
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    num_positions=64,
    num_pages=12,
    rms_norm_eps=1e-5,
    num_threads=3,
    exact=True,
)
# Halves in the cache are all that separates the exact step from float32.
TOLERANCE = 2e-3


@dataclass
class World:
    """A random decoder: what the native one gets, and its weights as floats."""

    weights: DecoderWeights
    floats: dict[str, Floats]
    windows: list[int]


def random_matrix(
    rows: int, columns: int, random: np.random.Generator, bias: Floats | None = None
) -> tuple[Matrix, Floats]:
    codes = random.integers(0, 16, (columns, rows), dtype=np.uint8)
    scales = random.uniform(0.5, 1.5, (-(-columns // 32), rows)) / (4.6 * columns**0.5)
    weights = GridWeights(codes, scales.astype(np.float16), bits=4, group_size=32)
    steps = codes.T.astype(np.float32) - 8
    spread = np.repeat(weights.scales.astype(np.float32).T, 32, axis=1)[:, :columns]
    return Matrix(weights, Transform(row_bias=bias)), steps * spread


def make_world(seed: int = 0, windows: Sequence[int] = (0, 0), bias: bool = False) -> World:
    random = np.random.default_rng(seed)
    floats: dict[str, Floats] = {}

    def vector(name: str, size: int, mean: float = 0.0) -> Floats:
        floats[name] = (mean + 0.3 * random.standard_normal(size)).astype(np.float32)
        return floats[name]

    def matrix(name: str, rows: int, columns: int) -> Matrix:
        added = vector(f"{name}_bias", rows) if bias and name != "head" else None
        packed, floats[name] = random_matrix(rows, columns, random, added)
        return packed

    def layer(i: int) -> DecoderLayer:
        return DecoderLayer(
            input_norm=vector(f"{i}.input", HIDDEN, 1),
            post_attention_norm=vector(f"{i}.post", HIDDEN, 1),
            qkv=[
                matrix(f"{i}.q", HEADS * DIM, HIDDEN),
                matrix(f"{i}.kv", 2 * KV_HEADS * DIM, HIDDEN),
            ],
            output=matrix(f"{i}.o", HIDDEN, HEADS * DIM),
            gate_up=[matrix(f"{i}.gate", INNER, HIDDEN), matrix(f"{i}.up", INNER, HIDDEN)],
            down=matrix(f"{i}.down", HIDDEN, INNER),
            sliding_window=windows[i],
        )

    angles = np.outer(np.arange(64), 100.0 ** -np.linspace(0, 1, DIM // 2, endpoint=False))
    floats["embedding"] = random.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
    weights = DecoderWeights(
        layers=[layer(i) for i in range(2)],
        final_norm=vector("final", HIDDEN, 1),
        embedding=floats["embedding"],
        head=matrix("head", VOCAB, HIDDEN),
        cosines=np.cos(angles).astype(np.float32),
        sines=np.sin(angles).astype(np.float32),
    )
    return World(weights, floats, list(windows))


def rotation_of(size: int, order: int, power: int, seed: int) -> tuple[Rotation, Floats]:
    """A rotation with the Hadamard matrix of Paley's first construction, and R as floats."""
    random = np.random.default_rng(seed)
    signs = random.choice(np.array([-1, 1], np.int8), size)
    prime = order - 1
    squares = set((np.arange(1, prime) ** 2 % prime).tolist()) if order > 1 else set()
    base = np.ones((order, order), np.int8)
    for i in range(1, order):
        for j in range(1, order):
            is_square = (i - j) % prime in squares
            base[i, j] = 1 if i == j or is_square else -1
        base[i, 0] = -1
    walsh = np.ones((1, 1))
    for _ in range(power):
        walsh = np.block([[walsh, walsh], [walsh, -walsh]])
    block = np.kron(base, walsh)
    blocks = size // len(block)
    matrix = signs[:, None] * np.kron(np.eye(blocks), block) / len(block) ** 0.5
    return Rotation(signs, base, power), matrix.astype(np.float32)


def reference(
    world: World,
    tokens: Sequence[int],
    residual: Floats | None = None,
    down: Floats | None = None,
) -> Floats:
    """Logits after every token, in float32."""
    w, table = world.floats, world.weights
    x = w["embedding"][list(tokens)]
    x = x if residual is None else x @ residual
    for i in range(2):
        x = x + attended(world, i, normed(x, w[f"{i}.input"]))
        h = normed(x, w[f"{i}.post"])
        gate = projected(world, f"{i}.gate", h)
        inner = gate / (1 + np.exp(-gate)) * projected(world, f"{i}.up", h)
        x = x + projected(world, f"{i}.down", inner if down is None else inner @ down)
    x = x if residual is None else x @ residual.T
    logits: Floats = normed(x, table.final_norm) @ w["head"].T
    return logits


def normed(x: Floats, weight: Floats) -> Floats:
    scaled: Floats = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight
    return scaled


def attended(world: World, i: int, h: Floats) -> Floats:
    count = len(h)
    qkv = np.concatenate([projected(world, f"{i}.q", h), projected(world, f"{i}.kv", h)], axis=1)
    heads = qkv.reshape(count, HEADS + 2 * KV_HEADS, DIM).transpose(1, 0, 2)
    queries, keys = turned(world, heads[:HEADS]), turned(world, heads[HEADS:-KV_HEADS])
    distance = np.arange(count)[:, None] - np.arange(count)
    window = world.windows[i] or count
    is_seen = (distance >= 0) & (distance < window)
    out = []
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        scores = np.where(is_seen, queries[head] @ keys[group].T / DIM**0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ heads[HEADS + KV_HEADS + group])
    return projected(world, f"{i}.o", np.concatenate(out, axis=1))


def projected(world: World, name: str, x: Floats) -> Floats:
    y: Floats = x @ world.floats[name].T
    return y + world.floats.get(f"{name}_bias", np.float32(0))


def turned(world: World, heads: Floats) -> Floats:
    count = heads.shape[1]
    cosines, sines = world.weights.cosines[:count], world.weights.sines[:count]
    first, second = heads[..., : DIM // 2], heads[..., DIM // 2 :]
    return np.concatenate(
        [first * cosines - second * sines, second * cosines + first * sines], axis=-1
    )


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence."""

    pages: Sequence[int]
    start: int
    token_ids: Sequence[int]
    num_logits: int
    largest_of: int = 0


def batch_of(*chunks: tuple[Sequence[int], int, Sequence[int], int]) -> DecodeBatch:
    """Chunks of (pages, start, tokens, num_logits)."""
    return DecodeBatch([Chunk(*chunk) for chunk in chunks])


TOKENS = np.random.default_rng(1).integers(0, VOCAB, 40).tolist()
PAGES = [3, 0, 7]


def score(world: World, config: DecoderConfig = CONFIG, pool: ThreadPool | None = None) -> Floats:
    with Decoder(config, world.weights) as decoder:
        return decoder.step(batch_of((PAGES, 0, TOKENS, len(TOKENS))), pool)


@pytest.mark.parametrize(
    ("windows", "bias"), [((0, 0), False), ((5, 17), False), ((0, 0), True), ((0, 40), True)]
)
def test_the_exact_step_computes_the_model(windows: tuple[int, int], bias: bool) -> None:
    world = make_world(windows=windows, bias=bias)
    expected = reference(world, TOKENS)
    np.testing.assert_allclose(score(world), expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(("order", "power"), [(1, 5), (12, 3), (4, 3), (20, 0)])
def test_rotations_of_the_residual_and_of_downs_input(order: int, power: int) -> None:
    world = make_world()
    size = order << power
    if HIDDEN % size == 0:
        rotation, matrix = rotation_of(HIDDEN, order, power, 2)
        expected = reference(world, TOKENS, residual=matrix)
        found = score(replace(world, weights=replace(world.weights, residual=rotation)))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())
    if INNER % size == 0:
        rotation, matrix = rotation_of(INNER, order, power, 3)
        expected = reference(world, TOKENS, down=matrix)
        found = score(replace(world, weights=replace(world.weights, down=rotation)))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(
    ("changes", "bound"),
    [({"exact": False}, 0.03), ({"kv_bits": 8}, 0.03), ({"kv_bits": 4}, 0.25)],
    ids=["int8 activations", "int8 cache", "int4 cache"],
)
def test_rounding_stays_in_bounds(changes: dict[str, Any], bound: float) -> None:
    world = make_world()
    expected = reference(world, TOKENS)
    error = score(world, replace(CONFIG, **changes)) - expected
    assert np.linalg.norm(error) < bound * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["float16", "uint16"])
def test_embeddings_of_16_bits(dtype: str) -> None:
    world = make_world()
    table = world.floats["embedding"]
    halves = table.astype(np.float16)
    wide = halves.astype(np.float32)
    if dtype == "uint16":  # bfloat16: the upper half of a float
        bits = (table.view(np.uint32) & 0xFFFF0000).astype(np.uint32)
        halves, wide = (bits >> 16).astype(np.uint16), bits.view(np.float32)
    expected = score(replace(world, weights=replace(world.weights, embedding=wide)))
    found = score(replace(world, weights=replace(world.weights, embedding=halves)))
    np.testing.assert_array_equal(found, expected)


def test_embeddings_of_8_bit_codes() -> None:
    world = make_world()
    scales = np.linspace(0.01, 0.02, VOCAB, dtype=np.float32)
    codes = np.rint(world.floats["embedding"] / scales[:, None]).clip(-127, 127).astype(np.int8)
    coded = replace(world.weights, embedding=codes, embedding_scales=scales)
    wide = replace(world.weights, embedding=codes * scales[:, None])
    np.testing.assert_array_equal(
        score(replace(world, weights=coded)), score(replace(world, weights=wide))
    )
    for broken in (replace(coded, embedding_scales=None), replace(wide, embedding_scales=scales)):
        with pytest.raises(DtypeError, match="embedding_scales"):
            Decoder(CONFIG, broken)


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.parametrize("exact", [True, False])
def test_bits_depend_on_nothing_but_the_sequence(kv_bits: int, exact: bool) -> None:
    world = make_world(windows=(0, 7))
    config = replace(CONFIG, kv_bits=kv_bits, exact=exact, max_rows=9)
    expected = score(world, replace(config, max_rows=1))
    other = TOKENS[::-1]
    with ThreadPool(3) as pool, Decoder(config, world.weights) as decoder:
        for pages in (PAGES, [9, 10, 11]):  # old keys and values lie in the pages afterwards
            decoder.step(batch_of((pages, 0, other, 0)), pool)
        found = []
        for start, stop in ((0, 16), (16, 19), (19, 20), (20, 33), (33, 40)):
            company = ([9, 10, 11], start, other[start:stop], stop - start)
            chunk = (PAGES, start, TOKENS[start:stop], stop - start)
            logits = decoder.step(batch_of(company, chunk), pool)
            found.append(logits[stop - start :])
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_every_tier_gives_the_same_bits() -> None:
    world = make_world(windows=(0, 7), bias=True)
    rotation, _ = rotation_of(INNER, 20, 3, 3)
    world = replace(world, weights=replace(world.weights, down=rotation))
    for kv_bits in (16, 8, 4):
        found = []
        for isa in supported_isas():
            with forced_isa(isa):
                found.append(score(world, replace(CONFIG, exact=False, kv_bits=kv_bits)))
        for logits in found[1:]:
            np.testing.assert_array_equal(logits, found[0])


WIDE = 3000


def wide_world(seed: int) -> tuple[DecoderConfig, DecoderWeights]:
    """A decoder whose head has two layers, and more rows than a thread deals out at once."""
    random = np.random.default_rng(seed)
    table = random.standard_normal((WIDE, HIDDEN)).astype(np.float32)
    head = random.standard_normal((WIDE, HIDDEN)).astype(np.float32)
    weights = make_world(seed).weights
    weights = replace(weights, embedding=table, head=Matrix(LayeredWeights(head)))
    return replace(CONFIG, vocab_size=WIDE, exact=False), weights


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("largest_of", [WIDE, WIDE - 1, 1700, 16, 5, 1])
def test_the_largest_logit_is_exact_and_the_largest(largest_of: int, num_threads: int) -> None:
    for seed in range(4):
        config, weights = wide_world(seed)
        with ThreadPool(num_threads) as pool, Decoder(config, weights) as decoder:
            for count in range(1, 9):
                chunk = Chunk(PAGES, 0, TOKENS[:count], 1)
                whole = decoder.step(DecodeBatch([chunk]), pool)[0]
                batch = DecodeBatch([replace(chunk, largest_of=largest_of)])
                found = decoder.step(batch, pool)[0]
                best = int(whole[:largest_of].argmax())
                assert int(found[:largest_of].argmax()) == best
                assert found[best] == whole[best]
                is_whole = found == whole
                if largest_of == WIDE:
                    assert is_whole.any()
                    assert not is_whole.all()
                assert np.corrcoef(found, whole)[0, 1] > 0.98
                assert np.abs(np.mean(found - whole)) < 0.05 * whole.std()


def test_estimates_are_the_same_in_every_tier_and_with_any_threads() -> None:
    config, weights = wide_world(0)
    batch = DecodeBatch([Chunk(PAGES, 0, TOKENS[:5], 1, WIDE)])
    found = []
    for isa in supported_isas():
        for num_threads in (1, 3):
            with (
                forced_isa(isa),
                ThreadPool(num_threads) as pool,
                Decoder(config, weights) as decoder,
            ):
                found.append(decoder.step(batch, pool))
    # Which outputs the threads try first decides how many others are in question.
    for logits in found[1:]:
        assert logits.argmax() == found[0].argmax()
        assert logits.max() == found[0].max()
    for logits in found[2::2]:
        np.testing.assert_array_equal(logits, found[0])


def test_logits_are_whole_where_several_tokens_or_all_are_wanted() -> None:
    config, weights = wide_world(1)
    with Decoder(config, weights) as decoder:
        whole = decoder.step(batch_of((PAGES, 0, TOKENS, 3)))
        batch = DecodeBatch([Chunk(PAGES, 0, TOKENS, 3, WIDE)])
        np.testing.assert_array_equal(decoder.step(batch), whole)
        company = Chunk([9, 10, 11], 0, TOKENS, 1)
        batch = DecodeBatch([Chunk(PAGES, 0, TOKENS, 1, WIDE), company])
        np.testing.assert_array_equal(decoder.step(batch), whole[[2, 2]])
    with Decoder(replace(config, exact=True), weights) as decoder:
        whole = decoder.step(batch_of((PAGES, 0, TOKENS, 1)))
        batch = DecodeBatch([Chunk(PAGES, 0, TOKENS, 1, WIDE)])
        np.testing.assert_array_equal(decoder.step(batch), whole)


def test_weights_too_large_for_an_upper_layer_are_read_whole() -> None:
    config, weights = wide_world(1)
    head = np.random.default_rng(1).standard_normal((WIDE, HIDDEN)).astype(np.float32) * 1e6
    weights = replace(weights, head=Matrix(LayeredWeights(head)))
    with Decoder(config, weights) as decoder:
        whole = decoder.step(batch_of((PAGES, 0, TOKENS, 1)))
        assert np.isfinite(whole).all()
        batch = DecodeBatch([Chunk(PAGES, 0, TOKENS, 1, WIDE)])
        np.testing.assert_array_equal(decoder.step(batch), whole)


@pytest.mark.parametrize("largest_of", [-1, WIDE + 1])
def test_there_is_no_largest_of_logits_that_do_not_exist(largest_of: int) -> None:
    config, weights = wide_world(0)
    with Decoder(config, weights) as decoder, pytest.raises(ShapeError):
        decoder.step(DecodeBatch([Chunk(PAGES, 0, TOKENS, 1, largest_of)]))


def test_a_copied_page_is_a_sequence_of_its_own() -> None:
    world = make_world()
    with Decoder(CONFIG, world.weights) as decoder:
        expected = decoder.step(batch_of((PAGES, 0, TOKENS, 40)))[20:]
        decoder.step(batch_of(([1, 2], 0, TOKENS[:20], 0)))
        decoder.copy_page(2, 5)
        decoder.step(batch_of(([1, 2], 20, [0, 1, 2], 0)))
        found = decoder.step(batch_of(([1, 5, 6], 20, TOKENS[20:], 20)))
        np.testing.assert_array_equal(found, expected)
        with pytest.raises(IndexError):
            decoder.copy_page(0, 12)
        assert decoder.page_bytes == 2 * KV_HEADS * (20 * 16 * 2 + 32 * 16 * 2)


def test_logits_go_where_they_are_wanted() -> None:
    world = make_world()
    with Decoder(CONFIG, world.weights) as decoder:
        out = np.full((4, VOCAB), 7, dtype=np.float32)
        logits = decoder.step(batch_of((PAGES, 0, TOKENS, 2), ([5], 0, [1], 0)), out=out)
        assert np.shares_memory(logits, out)
        np.testing.assert_array_equal(logits, score(world)[-2:])
        assert (out[2:] == 7).all()
        with pytest.raises(ShapeError, match="out has shape"):
            decoder.step(batch_of((PAGES, 0, TOKENS, 5)), out=out)
        with pytest.raises(DtypeError, match="out must be float32"):
            decoder.step(batch_of((PAGES, 0, [1], 1)), out=out.astype(np.float64))


def test_the_profile_names_every_operation() -> None:
    world = make_world()
    with Decoder(CONFIG, world.weights) as decoder:
        decoder.take_profile()
        decoder.step(batch_of((PAGES, 0, TOKENS, 1)))
        profile = decoder.take_profile()
        assert profile.steps == 1
        assert tuple(profile.seconds) == PHASES
        assert all(seconds > 0 for seconds in profile.seconds.values())
        assert decoder.take_profile().steps == 0


@pytest.mark.parametrize(
    ("chunk", "error"),
    [
        (([0], 0, [VOCAB], 1), IndexError),
        (([0], 0, [-1], 1), IndexError),
        (([12], 0, [1], 1), IndexError),
        (([-1], 0, [1], 1), IndexError),
        (([0], -1, [1], 1), IndexError),
        (([0], 16, [1], 1), IndexError),
        (([0, 1, 2, 3, 4], 64, [1], 1), IndexError),
        (([0], 2**31 - 1, [1, 1], 1), IndexError),
        (([0], 0, [], 0), ShapeError),
        (([], 0, [1], 0), ShapeError),
        (([0], 0, [1], 2), ShapeError),
        (([0], 0, [1], -1), (ShapeError, ValueError)),
    ],
)
def test_bad_chunks_are_refused(
    chunk: tuple[list[int], int, list[int], int], error: type[Exception]
) -> None:
    world = make_world()
    with Decoder(CONFIG, world.weights) as decoder, pytest.raises(error):
        decoder.step(batch_of(([5], 0, [1], 1), chunk))


def test_numbers_of_more_than_32_bits_are_refused() -> None:
    with pytest.raises(OverflowError):
        batch_of(([0], 0, [2**31], 1))


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    weights = make_world().weights
    cases: list[tuple[str, Any, type[Exception]]] = [
        ("final_norm", weights.final_norm[:-1], ShapeError),
        ("final_norm", weights.final_norm.astype(np.float64), DtypeError),
        ("embedding", weights.embedding[:-1], ShapeError),
        ("embedding", weights.embedding.astype(np.int32), DtypeError),
        ("cosines", weights.cosines[:, :-1], ShapeError),
        ("layers", weights.layers[:1], ShapeError),
        ("head", weights.layers[0].down, ShapeError),
        ("down", rotation_of(HIDDEN, 1, 5, 0)[0], ShapeError),
    ]
    for name, value, error in cases:
        changes: dict[str, Any] = {name: value}
        with pytest.raises(error):
            Decoder(CONFIG, replace(weights, **changes))
    layer = replace(weights.layers[0], down=weights.layers[0].output)
    with pytest.raises(ShapeError):
        Decoder(CONFIG, replace(weights, layers=[layer, layer]))


@pytest.mark.parametrize(
    "changes",
    [
        {"page_size": 8},
        {"kv_bits": 2},
        {"max_rows": 0},
        {"num_threads": 0},
        {"num_pages": 0},
        {"num_kv_heads": 3},
        {"head_dim": 21},
        {"num_positions": -1},
        {"rms_norm_eps": -1.0},
    ],
)
def test_bad_sizes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ShapeError):
        Decoder(replace(CONFIG, **changes), make_world().weights)


def test_a_pool_larger_than_planned_is_refused() -> None:
    world = make_world()
    with ThreadPool(4) as pool, pytest.raises(ShapeError):
        score(world, CONFIG, pool)


def test_overflow_is_an_error_not_a_result() -> None:
    world = make_world()
    embedding = world.floats["embedding"].copy()
    embedding[3] = np.inf
    weights = replace(world.weights, embedding=embedding)
    with Decoder(replace(CONFIG, exact=False), weights) as decoder:
        with pytest.raises(NonFiniteError):
            decoder.step(batch_of((PAGES, 0, [3], 1)))
        assert np.isfinite(decoder.step(batch_of(([5], 0, [1], 1)))).all()


def test_a_closed_decoder_says_so() -> None:
    decoder = Decoder(CONFIG, make_world().weights)
    decoder.close()
    decoder.close()
    with pytest.raises(NativeCallError, match="closed"):
        decoder.step(batch_of(([0], 0, [1], 1)))


def test_reading_memory() -> None:
    data = aligned_empty(1 << 16)
    data.view(np.float32)[:] = 1
    with ThreadPool(2) as pool:
        assert read_all(data, pool) == read_all(data) == data.size / 4
    with pytest.raises(ShapeError):
        read_all(data[4:])
    with pytest.raises(ShapeError):
        read_all(data[: 64 + 32])

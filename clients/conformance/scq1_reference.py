"""A decoder of SCQ1 frames in plain Python, written from docs/scq1.md and from nothing else.

    python scq1_reference.py vectors.json

checks every vector in the file and prints a summary; the exit status is 0 if all of them hold.
Slow and simple on purpose: it is here to be read beside the specification, whose section numbers
it names, and to prove that the specification is enough. Needs nothing but Python 3.11.
"""

from __future__ import annotations

import binascii
import json
import sys
import zlib
from itertools import product
from math import comb, prod
from pathlib import Path
from typing import Any, NamedTuple

DELTA, RANS, LETTERBOXED, TILED = 1, 2, 4, 8
SKIP, REWEIGHT, SWAP1, NEW = range(4)
CHUNK = 64

# Used (index, numerator) pairs of one latent, in canonical order.
Latent = list[tuple[int, int]]


class Refused(Exception):
    """These bytes are no frame."""


class Header(NamedTuple):
    flags: int
    model: bytes
    base_check: int
    full_check: int
    width: int
    height: int
    reference: int
    tile: int
    size: int


class Model(NamedTuple):
    """Section 1. tables: None, or cluster maps and frequencies as in section 6.2."""

    codes: int
    support: int
    denominator: int
    tables: dict[str, Any] | None


# --- section 2 ---------------------------------------------------------------------------------


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    every = product(range(1, total + 1), repeat=parts)
    return [c for c in every if sum(c) == total]


def partitions(total: int, parts: int) -> list[tuple[int, ...]]:
    return [c for c in compositions(total, parts) if list(c) == sorted(c, reverse=True)]


def led_compositions(total: int, parts: int, below: int) -> list[tuple[int, ...]]:
    return [
        c
        for c in compositions(total, parts)
        if all(c[0] > x for x in c[1 : 1 + below]) and all(c[0] >= x for x in c[1 + below :])
    ]


_LISTS: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}


def listed(function: Any, *arguments: int) -> list[tuple[int, ...]]:
    key = (function, *arguments)
    if key not in _LISTS:
        _LISTS[key] = function(*arguments)
    return _LISTS[key]


def uncolex(rank: int, size: int) -> list[int]:
    chosen = []
    for m in range(size, 0, -1):
        low, high = m - 1, m
        while comb(high, m) <= rank:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if comb(middle, m) <= rank else (low, middle)
        rank -= comb(low, m)
        chosen.append(low)
    return chosen[::-1]


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for count in range(5):
        if at + count >= len(data):
            break
        byte = data[at + count]
        value |= (byte & 127) << 7 * count
        if byte < 128:
            if count > 0 and byte == 0:
                raise Refused("varint longer than needed")
            return value, at + count + 1
    raise Refused("varint without an end")


def crc16(data: bytes) -> int:
    return binascii.crc_hqx(data, 0xFFFF)


def canonical(latent: Latent) -> Latent:
    return sorted(latent, key=lambda pair: (-pair[1], pair[0]))


# --- sections 3 and 4 --------------------------------------------------------------------------


def read_header(data: bytes) -> Header:
    if data[:3] == b"SQ\x01":
        raise Refused("version 1")
    if len(data) < 10 or data[0] != 0x53 or data[1] >> 4 != 2:
        raise Refused("magic, version or length")
    flags = data[1] & 15
    checks = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    width = height = reference = tile = 0
    at = 10
    if flags & DELTA:
        if not flags & RANS or flags & LETTERBOXED:
            raise Refused("flags of a delta frame")
        reference = int.from_bytes(data[at : at + 4], "little")
        at += 4
    else:
        width, at = read_varint(data, at)
        height, at = read_varint(data, at)
        if not (1 <= width <= 65535 and 1 <= height <= 65535):
            raise Refused("size of the picture")
    if flags & TILED:
        tile = data[at] if at < len(data) else 0
        at += 1
        if tile == 0:
            raise Refused("tile side")
    if at > len(data):
        raise Refused("end inside the header")
    return Header(flags, data[2:6], *checks, width, height, reference, tile, at)


def split_tiles(rows: int, columns: int, side: int) -> list[tuple[list[int], int]]:
    """Per tile the raster positions of its latents, and its number of columns."""
    side = side or max(rows, columns)
    tiles = []
    for y in range(0, rows, side):
        for x in range(0, columns, side):
            ys, xs = range(y, min(y + side, rows)), range(x, min(x + side, columns))
            tiles.append(([r * columns + c for r in ys for c in xs], len(xs)))
    return tiles


def decode(
    data: bytes,
    model: Model,
    grid: tuple[int, int],
    reference: list[Latent] | None = None,
    partial: bool = False,
) -> tuple[list[Latent], bool]:
    """Latents in raster order and whether they are complete. Raises Refused."""
    header = read_header(data)
    tiles = split_tiles(*grid, header.tile)
    if header.flags & DELTA and (
        reference is None or fingerprint(reference, grid, model) != header.reference
    ):
        raise Refused("reference: ask for a key frame")
    if header.flags & RANS and model.tables is None:
        raise Refused("rANS without tables")
    at, lengths = header.size, []
    if header.flags & RANS:
        for _ in range(2 * len(tiles) - 1):
            length, at = read_varint(data, at)
            lengths.append(length)
    else:
        lengths = [
            sum(chunk_bytes(r) for r in chunked([model.codes] * len(places))) for places, _ in tiles
        ]
    base_end = at + sum(lengths[: len(tiles)])
    if base_end > len(data):
        raise Refused("end inside the base layer")
    if crc16(data[:6] + data[10:base_end]) != header.base_check:
        raise Refused("base check")
    whole = crc16(data[:6] + data[10:]) == header.full_check
    if not whole and not partial:
        raise Refused("full check")
    base_segments = []
    for length in lengths[: len(tiles)]:
        base_segments.append(data[at : at + length])
        at += length
    old = [[reference[p] for p in places] if reference else [] for places, _ in tiles]
    base = []
    for segment, (places, columns), before in zip(base_segments, tiles, old, strict=True):
        if header.flags & DELTA:
            base.append(delta_base(segment, columns, before, model))
        elif header.flags & RANS:
            leads = rans_base(segment, len(places), columns, model)
            base.append([(NEW, lead) for lead in leads])
        else:
            numbers = unpack_numbers(segment, [model.codes] * len(places))
            base.append([(NEW, lead) for lead in numbers])
    if whole:
        try:
            parts = enhance(data[base_end:], lengths[len(tiles) :], header, base, old, model)
            return merge(parts, tiles), True
        except Refused:
            if not partial:
                raise
    shown = [
        [
            [(lead, model.denominator)] if mode == NEW else before[i]
            for i, (mode, lead) in enumerate(symbols)
        ]
        for symbols, before in zip(base, old, strict=True)
    ]
    return merge(shown, tiles), False


def enhance(
    data: bytes,
    lengths: list[int],
    header: Header,
    base: list[list[tuple[int, int]]],
    old: list[list[Latent]],
    model: Model,
) -> list[list[Latent]]:
    if not header.flags & RANS:
        limits = [[rest_radix(lead, model) for _, lead in symbols] for symbols in base]
        lengths = [sum(chunk_bytes(c) for c in chunked(radices)) for radices in limits]
        if sum(lengths) != len(data):
            raise Refused("length of the frame")
    else:
        lengths = [*lengths, len(data) - sum(lengths)]
        if lengths[-1] < 0:
            raise Refused("length table beyond the frame")
    parts, at = [], 0
    for number, (length, symbols) in enumerate(zip(lengths, base, strict=True)):
        segment = data[at : at + length]
        at += length
        if header.flags & RANS:
            parts.append(rans_rest(segment, symbols, old[number], model))
        else:
            ranks = unpack_numbers(segment, limits[number])
            leads = [lead for _, lead in symbols]
            pairs = zip(leads, ranks, strict=True)
            parts.append([unrank_rest(lead, rank, model) for lead, rank in pairs])
    return parts


def merge(parts: list[list[Latent]], tiles: list[tuple[list[int], int]]) -> list[Latent]:
    placed: dict[int, Latent] = {}
    for latents, (places, _) in zip(parts, tiles, strict=True):
        placed.update(zip(places, latents, strict=True))
    return [placed[position] for position in range(len(placed))]


# --- section 5 ---------------------------------------------------------------------------------


def chunked(radices: list[int]) -> list[list[int]]:
    return [radices[i : i + CHUNK] for i in range(0, len(radices), CHUNK)]


def chunk_bytes(radices: list[int]) -> int:
    return ((prod(radices) - 1).bit_length() + 7) // 8


def unpack_numbers(segment: bytes, radices: list[int]) -> list[int]:
    numbers, at = [], 0
    for chunk in chunked(radices):
        size = chunk_bytes(chunk)
        value = int.from_bytes(segment[at : at + size], "little")
        at += size
        for radix in chunk:
            value, number = divmod(value, radix)
            numbers.append(number)
        if value:
            raise Refused("chunk beyond its last number")
    return numbers


def rest_cases(lead: int, model: Model) -> list[tuple[int, int, int]]:
    """t, u and the number of latents, in order."""
    n, above = model.denominator, model.codes - 1 - lead
    return [
        (t, u, comb(lead, u) * comb(above, t - 1 - u) * len(listed(led_compositions, n, t, u)))
        for t in range(1, model.support + 1)
        for u in range(t)
    ]


def rest_radix(lead: int, model: Model) -> int:
    return sum(count for _, _, count in rest_cases(lead, model))


def unrank_rest(lead: int, rank: int, model: Model) -> Latent:
    cases = rest_cases(lead, model)
    while rank >= cases[0][2]:
        rank -= cases.pop(0)[2]
    t, u, _ = cases[0]
    weights = listed(led_compositions, model.denominator, t, u)
    subsets, composition = divmod(rank, len(weights))
    below, above = divmod(subsets, comb(model.codes - 1 - lead, t - 1 - u))
    others = uncolex(below, u) + [x + lead + 1 for x in uncolex(above, t - 1 - u)]
    return canonical(list(zip([lead, *others], weights[composition], strict=True)))


# --- section 6 ---------------------------------------------------------------------------------


class Stream:
    """Section 6.1."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.state = 0

    def take(self, count: int) -> int:
        if self.at + count > len(self.data):
            raise Refused("stream too short")
        self.at += count
        return int.from_bytes(self.data[self.at - count : self.at], "little")

    def symbol(self, frequencies: list[int]) -> int:
        if self.at == 0:
            self.state = self.take(4)
            if self.state < 65536:
                raise Refused("stream starts below 65536")
        slot = self.state % 65536
        symbol = start = 0
        while start + frequencies[symbol] <= slot:
            start += frequencies[symbol]
            symbol += 1
        self.state = frequencies[symbol] * (self.state // 65536) + slot - start
        if self.state < 65536:
            self.state = self.state * 65536 + self.take(2)
        return symbol

    def end(self) -> None:
        if self.at != len(self.data) or (self.at and self.state != 65536):
            raise Refused("stream does not end as it should")


def read_symbol(stream: Stream, model: Model, name: str, row: int) -> int:
    assert model.tables is not None
    table = model.tables["frequencies"].get(name)
    return 0 if table is None else stream.symbol(table[row])


def cluster(model: Model, which: str, index: int) -> int:
    assert model.tables is not None
    number: int = model.tables[which][index]
    return number


def neighbour_row(values: list[int], columns: int, outside: int) -> int:
    """The row for the latent that follows `values` in its tile."""
    at = len(values)
    left = values[at - 1] if at % columns else outside
    above = values[at - columns] if at >= columns else outside
    return left * (outside + 1) + above


def rans_base(segment: bytes, count: int, columns: int, model: Model) -> list[int]:
    assert model.tables is not None
    outside = max(model.tables["base_cluster"]) + 1
    stream = Stream(segment)
    leads: list[int] = []
    clusters: list[int] = []
    for _ in range(count):
        row = neighbour_row(clusters, columns, outside)
        leads.append(read_symbol(stream, model, "base", row))
        clusters.append(cluster(model, "base_cluster", leads[-1]))
    stream.end()
    return leads


def delta_base(
    segment: bytes, columns: int, before: list[Latent], model: Model
) -> list[tuple[int, int]]:
    stream = Stream(segment)
    modes: list[int] = []
    symbols: list[tuple[int, int]] = []
    for latent in before:
        lead = latent[0][0]
        mode = read_symbol(stream, model, "mode", neighbour_row(modes, columns, 4))
        modes.append(mode)
        if mode == NEW:
            lead = read_symbol(stream, model, "new", cluster(model, "other_cluster", lead))
        symbols.append((mode, lead))
    stream.end()
    return symbols


def rans_rest(
    segment: bytes, symbols: list[tuple[int, int]], before: list[Latent], model: Model
) -> list[Latent]:
    stream, latents = Stream(segment), []
    for number, (mode, lead) in enumerate(symbols):
        if mode == NEW:
            latent = read_new(stream, lead, model)
        elif mode == SKIP:
            latent = before[number]
        else:
            latent = read_change(stream, mode, before[number], model)
        latents.append(canonical(latent))
    stream.end()
    return latents


def read_new(stream: Stream, lead: int, model: Model) -> Latent:
    row = cluster(model, "base_cluster", lead)
    size = 1 + read_symbol(stream, model, "support", row)
    number = read_symbol(stream, model, f"partition{size}", 0)
    indices = [lead]
    for _ in range(size - 1):
        row = cluster(model, "other_cluster", lead)
        index = read_symbol(stream, model, "other", row)
        if index in indices:
            raise Refused("an index twice")
        indices.append(index)
    weights = listed(partitions, model.denominator, size)[number]
    return list(zip(indices, weights, strict=True))


def read_change(stream: Stream, mode: int, before: Latent, model: Model) -> Latent:
    assert model.tables is not None
    indices, weights = [i for i, _ in before], tuple(w for _, w in before)
    size = len(indices)
    name = f"reweight{size}"
    if mode == SWAP1:
        name = f"swap_weights{size}"
        slot = read_symbol(stream, model, f"slot{size}", 0)
        row = cluster(model, "other_cluster", indices[slot])
        index = read_symbol(stream, model, "swap", row)
        if index in indices:
            raise Refused("an index twice")
        indices[slot] = index
    elif name not in model.tables["frequencies"]:
        raise Refused("REWEIGHT of fixed weights")
    row = listed(partitions, model.denominator, size).index(weights)
    number = read_symbol(stream, model, name, row)
    return list(zip(indices, listed(compositions, model.denominator, size)[number], strict=True))


# --- section 8 ---------------------------------------------------------------------------------


def slots(latent: Latent, support: int) -> Latent:
    return latent + [(latent[0][0], 0)] * (support - len(latent))


def fingerprint(latents: list[Latent], grid: tuple[int, int], model: Model) -> int:
    data = grid[0].to_bytes(2, "little") + grid[1].to_bytes(2, "little")
    for latent in latents:
        for index, numerator in slots(latent, model.support):
            data += index.to_bytes(2, "little") + bytes([numerator])
    return zlib.crc32(data)


# --- the vectors -------------------------------------------------------------------------------


def latents_of(record: dict[str, Any]) -> list[Latent]:
    rows = zip(record["indices"], record["numerators"], strict=True)
    return [[(i, w) for i, w in zip(*row, strict=True) if w] for row in rows]


def model_of(profile: dict[str, Any]) -> Model:
    return Model(
        profile["num_codes"], profile["max_support"], profile["denominator"], profile["tables"]
    )


def check_vector(vector: dict[str, Any], model: Model) -> str | None:
    """What is wrong, or None."""
    data, grid = bytes.fromhex(vector["codes"]), tuple(vector["grid"])
    before = latents_of(vector["reference"]) if vector.get("reference") else None
    if "refused" in vector:
        try:
            decode(data, model, grid, before)
        except Refused:
            return None
        return "was not refused"
    header, expected = read_header(data), vector["header"]
    for name in ("width", "height", "reference", "tile"):
        if getattr(header, name) != (expected[name] or 0):
            return f"{name} is {getattr(header, name)}"
    if header.flags != expected["flags"] or header.model.hex() != expected["model_hash"]:
        return "flags or model differ"
    if decode(data, model, grid, before) != (latents_of(vector), True):
        return "latents differ"
    for length in range(vector["base_bytes"], len(data)):
        cut = decode(data[:length], model, grid, before, partial=True)
        if cut != (latents_of(vector["base"]), False):
            return f"base layer differs when cut to {length} bytes"
    for length in range(vector["base_bytes"]):
        try:
            decode(data[:length], model, grid, before, partial=True)
        except Refused:
            continue
        return f"was not refused when cut to {length} bytes"
    return None


def check_file(path: Path) -> list[str]:
    """One line for every vector that does not hold."""
    document = json.loads(path.read_text())
    faults = []
    for vector in document["vectors"]:
        try:
            fault = check_vector(vector, model_of(document["profiles"][vector["profile"]]))
        except Refused as error:
            fault = f"refused: {error}"
        if fault:
            faults.append(f"{vector['name']}: {fault}")
    print(f"{len(document['vectors']) - len(faults)} of {len(document['vectors'])} vectors hold")
    return faults


if __name__ == "__main__":
    found = check_file(Path(sys.argv[1]))
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(1 if found else 0)

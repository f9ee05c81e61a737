"""Makes the calibration text: `python -m vqllm.texts.generate MODEL OUT.txt.gz`.

A model continues openings of many kinds, a batch of them at a time, by plain sampling: its own
text is text that it can be calibrated on without anybody else's licence. Needs a folder of the
llama family; about 20 minutes on two cores for the text that ships.
"""

from __future__ import annotations

import gzip
import logging
import random
import re
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from vqllm.checkpoint import FINAL_NORM, Checkpoint
from vqllm.decoder.norm import rms_norm
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.weights import BlockWeights, load_block
from vqllm.errors import InvalidConfig
from vqllm.runtime.tokenizer import ChatTokenizer
from vqllm.texts.openings import is_chat, opening, question

logger = logging.getLogger(__name__)

SEPARATOR = "\n\n\n"
TEMPERATURES = (0.8, 0.9, 1.0, 1.1)

_Tokenizers = tuple[ChatTokenizer, Tokenizer]


@dataclass(frozen=True)
class GenerationConfig:
    """How much text to write, and how boldly.

    Attributes:
        num_texts, num_tokens: texts, and tokens of each with its opening.
        batch_size: texts that are written side by side.
        min_p: tokens less probable than this part of the likeliest one are never drawn.
    """

    num_texts: int = 448
    num_tokens: int = 512
    batch_size: int = 64
    min_p: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("num_texts", "num_tokens", "batch_size"):
            if getattr(self, field) < 1:
                raise InvalidConfig(field, getattr(self, field), "at least 1")


class _Cache:
    """Keys and values of all blocks, bfloat16 (layers, b, kv_heads, tokens, head_dim)."""

    def __init__(self, checkpoint: Checkpoint, config: GenerationConfig) -> None:
        model = checkpoint.config
        shape = (
            model.num_layers,
            config.batch_size,
            model.num_kv_heads,
            config.num_tokens,
            model.head_dim,
        )
        self.keys = torch.zeros(shape, dtype=torch.bfloat16)
        self.values = torch.zeros(shape, dtype=torch.bfloat16)


class BatchWriter:
    """One model in bfloat16 that writes several texts in step, one token of each at a time."""

    def __init__(self, folder: Path, config: GenerationConfig) -> None:
        self._checkpoint = Checkpoint(folder)
        self._config = config
        plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizers = (ChatTokenizer.from_folder(folder), plain)
        model = self._checkpoint.config
        self._blocks = [
            _halved(load_block(self._checkpoint, layer)) for layer in range(model.num_layers)
        ]
        self._embedding = torch.from_numpy(self._checkpoint.embedding()).bfloat16()
        self._head = torch.from_numpy(self._checkpoint.head()).bfloat16()
        self._final_norm = torch.from_numpy(self._checkpoint.norm(FINAL_NORM)).bfloat16()
        self._rotary = RotaryTable.build(model, config.num_tokens)
        self._random = torch.Generator().manual_seed(config.seed)

    def write(self, first: int) -> list[str]:
        """Texts number `first` and the following, one per place in the batch."""
        indices = range(first, first + self._config.batch_size)
        rows = [_Row(self._tokenizers, index, self._config) for index in indices]
        cache = _Cache(self._checkpoint, self._config)
        temperatures = torch.tensor([row.temperature for row in rows])
        tokens = torch.tensor([row.next(0) for row in rows])
        for position in range(self._config.num_tokens - 1):
            logits = self._logits(tokens, position, cache)
            drawn = self._draw(logits / temperatures[:, None], [row.banned for row in rows])
            tokens = torch.tensor([row.next(int(t)) for row, t in zip(rows, drawn, strict=True)])
        return [row.text() for row in rows]

    def _logits(self, tokens: Tensor, position: int, cache: _Cache) -> Tensor:
        hidden = self._embedding[tokens][:, None]
        for layer, block in enumerate(self._blocks):
            hidden = self._block(hidden, block, position, (cache.keys[layer], cache.values[layer]))
        normed = rms_norm(hidden[:, 0], self._final_norm, self._checkpoint.config.rms_norm_eps)
        return F.linear(normed, self._head).float()

    def _block(
        self, hidden: Tensor, block: BlockWeights, position: int, cache: tuple[Tensor, Tensor]
    ) -> Tensor:
        """One token per sequence through a block: (b, 1, d) to (b, 1, d)."""
        config = self._checkpoint.config
        normed = rms_norm(hidden, block.input_norm, config.rms_norm_eps)

        def heads(part: str) -> Tensor:
            projected = block.project(f"self_attn.{part}_proj", normed)
            return projected.view(len(hidden), 1, -1, config.head_dim).transpose(1, 2)

        keys, values = cache
        keys[:, :, position] = self._rotary.rotate(heads("k").float(), position)[:, :, 0]
        values[:, :, position] = heads("v")[:, :, 0]
        queries = self._rotary.rotate(heads("q").float(), position).bfloat16()
        context = F.scaled_dot_product_attention(
            queries.reshape(len(hidden), config.num_kv_heads, -1, config.head_dim),
            keys[:, :, : position + 1],
            values[:, :, : position + 1],
        )
        hidden = hidden + block.project("self_attn.o_proj", context.flatten(1)[:, None])
        normed = rms_norm(hidden, block.post_attention_norm, config.rms_norm_eps)
        gates = F.silu(block.project("mlp.gate_proj", normed))
        gated = gates * block.project("mlp.up_proj", normed)
        return hidden + block.project("mlp.down_proj", gated)

    def _draw(self, logits: Tensor, banned: list[list[int]]) -> Tensor:
        """One token per row of logits (b, vocabulary), never a banned one."""
        for row, token_ids in enumerate(banned):
            logits[row, token_ids] = -torch.inf
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        sums = F.threshold(weights, self._config.min_p, 0.0).cumsum(-1)
        points = torch.rand(len(sums), 1, generator=self._random) * sums[:, -1:]
        return torch.searchsorted(sums, points).clamp(max=sums.shape[1] - 1)[:, 0]


class _Row:
    """One text while it is written: tokens that are forced, then tokens that are drawn."""

    def __init__(self, tokenizers: _Tokenizers, index: int, config: GenerationConfig) -> None:
        self._rng = random.Random(f"{config.seed}/{index}")
        self._tokenizer, self._plain = tokenizers
        self._is_chat = is_chat(index)
        self.temperature = TEMPERATURES[index % len(TEMPERATURES)]
        self.banned = [] if self._is_chat else sorted(self._tokenizer.eos_token_ids)
        self._forced = deque(self._question() if self._is_chat else self._opening())
        self._written: list[int] = []

    def _opening(self) -> list[int]:
        return self._tokenizer.encode(opening(self._rng))

    def _question(self) -> list[int]:
        message = {"role": "user", "content": question(self._rng)}
        return self._tokenizer.apply_chat_template([message])

    def next(self, drawn: int) -> int:
        """The token at the next position: a forced one while there are any, else `drawn`."""
        token = self._forced.popleft() if self._forced else drawn
        self._written.append(token)
        if token in self._tokenizer.eos_token_ids and not self._forced:
            self._forced.extend(self._question())  # the assistant is done: somebody else asks
        return token

    def text(self) -> str:
        """The text, in the spacing of WikiText where it began so; control tokens spelled out."""
        decoded: str = self._plain.decode(self._written, skip_special_tokens=False)
        return tokenized(decoded) if decoded.startswith(" =") else decoded


def tokenized(text: str) -> str:
    """`text` with the spaces that word-level corpora such as WikiText put around punctuation."""
    text = re.sub(r"(\d)([.,])(\d)", r"\1 @\2@ \3", text)
    text = re.sub(r"(\w)-(\w)", r"\1 @-@ \2", text)
    text = re.sub(r"(?<!@)([.,;:!?()\"])(?!@)", r" \1 ", text)
    text = re.sub(r"(\w)('s?\b)", r"\1 \2", text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "".join(_line(line) for line in lines if line)


def _line(line: str) -> str:
    return f" \n {line} \n \n" if line.startswith("=") and line.endswith("=") else f" {line} \n"


def is_worth_keeping(text: str) -> bool:
    """Whether a text repeats itself too little to be a loop."""
    words = re.findall(r"\w+", text.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(triples) > 100 and len(set(triples)) > 0.6 * len(triples)


def generate(folder: Path, config: GenerationConfig) -> str:
    """Texts of the model in `folder`, in a random order, with `SEPARATOR` between them."""
    writer = BatchWriter(folder, config)
    texts: list[str] = []
    with torch.inference_mode():
        for first in range(0, config.num_texts, config.batch_size):
            written = writer.write(first)
            texts += [text for text in written if is_worth_keeping(text)]
            logger.info("%d texts, %d kept", first + len(written), len(texts))
    random.Random(config.seed).shuffle(texts)
    return SEPARATOR.join(dict.fromkeys(texts))


def _halved(block: BlockWeights) -> BlockWeights:
    return BlockWeights(
        input_norm=block.input_norm.bfloat16(),
        post_attention_norm=block.post_attention_norm.bfloat16(),
        linears={name: weight.bfloat16() for name, weight in block.linears.items()},
    )


def main(arguments: list[str]) -> None:
    """Write the text of the model folder `arguments[0]` to the gzip file `arguments[1]`."""
    logging.basicConfig(level=logging.INFO)
    text = generate(Path(arguments[0]), GenerationConfig())
    Path(arguments[1]).write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main(sys.argv[1:])

"""A CLIP tokenizer whose byte-pair merges make every word of the shapes grammar one token."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffalign.shapes.prompts import COUNTS, OPENINGS
from diffalign.shapes.world import COLORS, RELATIONS, SHAPES

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 14  # the longest prompt of the grammar has 11 words; begin and end take one each


def words() -> list[str]:
    text = " ".join([*COLORS, *SHAPES, *(s + "s" for s in SHAPES), *RELATIONS, *COUNTS.values(), *OPENINGS])
    return sorted(set(text.split()) | {"a", "an", "and", "of", "one"})


def merged(pieces: list[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """What byte-pair encoding leaves of the pieces of a word after these merges, in their order."""
    pieces = list(pieces)
    for left, right in merges:
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == (left, right):
                pieces[i : i + 2] = [left + right]
            i += 1
    return pieces


def build(max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """Letters and digits are tokens too, so a word outside the grammar is spelt instead of lost."""
    from transformers import CLIPTokenizer

    symbols = [*string.ascii_lowercase, *string.digits, ",", ".", "-"]
    vocab = [*symbols, *(s + "</w>" for s in symbols)]
    merges: list[tuple[str, str]] = []
    for word in sorted(words(), key=lambda w: (-len(w), w)):  # long words first: their merges must win
        pieces = merged([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocab.append(pieces[0])
    tokens = ["<|startoftext|>", "<|endoftext|>", *dict.fromkeys(vocab)]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    tokenizer.model_max_length = max_length
    return tokenizer

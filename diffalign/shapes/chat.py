"""Chat with a picture, in tokens: the tokenizer of `tiny-vlm`, Qwen's chat format and patches, and trees of sequences.

A tree is one picture with many captions and questions whose branches do not see each other. It costs little more than
the picture alone, and every branch computes what the plain sequence prefix + branch would.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.shapes import questions
from diffalign.shapes.tokenizer import merged
from diffalign.shapes.tokenizer import words as grammar
from diffalign.shapes.world import SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

PATCH, MERGE, TIME = 8, 2, 2
GRID = SIZE // PATCH  # patches a side
SIDE = GRID // MERGE  # image tokens a side
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))
YES, NO = ("yes", "Yes"), ("no", "No")  # both spellings are equally right


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen's, whose merges make one token of every word of the grammar and of the questions."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    asked = " ".join(
        [questions.DESCRIBE, questions.ANSWER, *questions.MATCH, *questions.FAULTY, "user assistant system"]
    )
    text = {piece for piece, _ in split.pre_tokenize_str(asked)}
    text |= {form for w in [*grammar(), *YES, *NO, "YES", "NO"] for form in (w, "Ġ" + w)}
    merges: list[tuple[str, str]] = []
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    for word in sorted(text, key=lambda w: (-len(w.strip("Ġ")), w.strip("Ġ"), w)):  # long words first: they must win
        pieces = merged(list(word), merges)
        while len(pieces) > 1:
            start = 1 if pieces[0] == "Ġ" and len(pieces) > 2 else 0  # the space comes last
            merges.append((pieces[start], pieces[start + 1]))
            pieces[start : start + 2] = [pieces[start] + pieces[start + 1]]
            tokens.append(pieces[start])
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer, fast.decoder = split, decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=SPECIAL[END], pad_token=SPECIAL[PAD], extra_special_tokens=list(SPECIAL[1:])
    )


def patchify(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> patches [B * H/P * W/P, 3 * T * P * P] in Qwen's order: the four patches that become
    one token are neighbours. A still picture is repeated in time."""
    b, c, h, w = images.shape
    x = (images * 2 - 1)[:, None].expand(b, TIME, c, h, w)
    x = x.reshape(b, TIME, c, h // PATCH // MERGE, MERGE, PATCH, w // PATCH // MERGE, MERGE, PATCH)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, c * TIME * PATCH * PATCH)


@dataclass
class Tree:
    """One picture's token sequence. Branch 0 is the picture, 1 the request to describe it, the others leaves."""

    ids: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)  # of the branch: 0, or 1 for a caption
    position: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)  # the token that follows, or -100
    other: list[int] = field(default_factory=list)  # an equally right one

    def grow(
        self, branch: int, parent: int, start: int, ids: Sequence[int],
        labels: Sequence[int] = (), other: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.ids += ids
        self.branch += [branch] * len(ids)
        self.parent += [parent] * len(ids)
        self.position += range(start, start + len(ids))
        self.label += labels or [-100] * len(ids)
        self.other += other or [-100] * len(ids)


class Chat:
    """The chat format in token ids, with a picture of the world's size."""

    def __init__(self, words: PreTrainedTokenizerFast) -> None:
        @cache
        def encode(text: str) -> tuple[int, ...]:
            return tuple(words(text, add_special_tokens=False).input_ids)

        self.encode = encode
        self.head = [START, *encode("user\n"), VISION_START]
        self.image = [IMAGE] * SIDE**2
        self.tail = [END, *encode("\n"), START, *encode("assistant\n")]
        self.yes, self.no = ([encode(w)[0] for w in group] for group in (YES, NO))

    def prefix(self, query: str) -> list[int]:
        """All up to the model's turn."""
        return [*self.head, *self.image, VISION_END, *self.encode(query), *self.tail]

    def tree(self, captions: list[str], answers: list[tuple[str, bool]], rng: random.Random) -> Tree:
        tree, start = Tree(), len(self.head) + SIDE + 1  # a picture takes as many positions as its grid is wide
        tree.grow(0, 0, 0, self.head)
        tree.grow(0, 0, len(self.head), self.image)
        tree.grow(0, 0, start - 1, [VISION_END])
        ask = [*self.encode(questions.DESCRIBE), *self.tail]
        if captions:  # its last token comes with each caption, whose first word it must predict
            tree.grow(1, 0, start, ask[:-1])
        for k, text in enumerate(captions, 2):
            ids = [ask[-1], *self.encode(text)]
            labels = [*ids[1:], END]
            tree.grow(k, 1, start + len(ask) - 1, ids, labels, labels)
        for k, (text, right) in enumerate(answers, 2 + len(captions)):
            ids, spelt = [*self.encode(text), *self.tail], self.yes if right else self.no
            quiet = [-100] * (len(ids) - 1)
            tree.grow(k, 0, start, [*ids, rng.choice(spelt)], [*quiet, spelt[0], END], [*quiet, spelt[1], END])
        return tree


def pack(trees: list[Tree], head: int) -> dict[str, Tensor]:
    """Right-padded ids [B, L], labels, an additive mask [B, 1, L, L] along the trees, M-RoPE positions [3, B, L]."""
    longest = max(len(t.ids) for t in trees)

    def rows(name: str, fill: int) -> Tensor:
        return torch.tensor([getattr(t, name) + [fill] * (longest - len(t.ids)) for t in trees])

    ids, branch, parent = rows("ids", PAD), rows("branch", -1), rows("parent", -1)
    mine, theirs = branch[:, :, None], branch[:, None]
    sees = (theirs == mine) | (theirs == 0) | ((theirs == 1) & (parent[:, :, None] == 1))
    position = rows("position", 0).expand(3, -1, -1).clone()
    side = torch.arange(SIDE)
    picture = slice(head, head + SIDE * SIDE)
    position[:, :, picture] = head
    position[1, :, picture] += side.repeat_interleave(SIDE)
    position[2, :, picture] += side.repeat(SIDE)
    sees &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape).masked_fill(~sees, -1e9)[:, None]
    return {"input_ids": ids, "position_ids": position, "attention_mask": mask, "label": rows("label", -100),
            "other": rows("other", -100)}  # fmt: skip


def load(folder: Path) -> Qwen3VLForConditionalGeneration:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def log_probs(model: Any, talk: Chat, images: Tensor, queries: Sequence[str], texts: Sequence[str]) -> Tensor:
    """fp32 log-probabilities [B, 1 + L, V] at the end of the chat about each image and after every token of the text
    that follows, as from any Qwen3-VL; rows are padded to the longest text."""
    prefixes = [talk.prefix(q) for q in queries]
    rows = [p + list(talk.encode(t)) for p, t in zip(prefixes, texts, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    logits = model(
        input_ids=ids,
        attention_mask=torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        mm_token_type_ids=(ids == IMAGE).int(),
        pixel_values=patchify(images),
        image_grid_thw=torch.tensor([[1, GRID, GRID]]).expand(len(images), -1),
        use_cache=False,
    ).logits
    ends = [logits[i, len(p) - 1 : len(row)] for i, (p, row) in enumerate(zip(prefixes, rows, strict=True))]
    return torch.nn.utils.rnn.pad_sequence(ends, batch_first=True).float().log_softmax(-1)


def echo(model: Any, talk: Chat, images: Tensor, texts: Sequence[str]) -> Tensor:
    """Mean log-probability [B] of a prompt's tokens as the description of the image (PromptEcho, arXiv 2604.12652)."""
    logp = log_probs(model, talk, images, [questions.DESCRIBE] * len(texts), texts)
    ids = [torch.tensor(talk.encode(t)) for t in texts]
    return torch.stack([logp[i, torch.arange(len(t)), t].mean() for i, t in enumerate(ids)])


def says_yes(model: Any, talk: Chat, images: Tensor, queries: Sequence[str]) -> Tensor:
    """P(yes) / (P(yes) + P(no)) [B], both spellings summed."""
    logp = log_probs(model, talk, images, queries, [""] * len(queries))[:, 0]
    return (logp[:, talk.yes].logsumexp(1) - logp[:, talk.no].logsumexp(1)).sigmoid()

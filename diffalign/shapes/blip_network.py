"""The network of tiny-image-reward, its start from tiny-dino, its words, and the folder it is published as."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffalign.rewards import _blip
from diffalign.rewards._preprocess import CLIP_MEAN, CLIP_STD
from diffalign.rewards.image_reward import ADDED, CONTEXT, TINY_FILE, TINY_HEADS
from diffalign.shapes import tokenizer, world
from diffalign.shapes.aesthetic import layered
from diffalign.shapes.dino_network import MEAN, PATCH, STD
from diffalign.shapes.publish import replacing

if TYPE_CHECKING:
    from transformers import BertTokenizer, Dinov2Model

WIDTH, VISION_LAYERS, TEXT_LAYERS = 128, 5, 3


def words() -> BertTokenizer:
    """Every word of the grammar is one token; letters and digits are too, so that other words are spelt."""
    from transformers import BertTokenizer

    symbols = [*string.ascii_lowercase, *string.digits]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *tokenizer.words(), *symbols, *("##" + s for s in symbols), ",", ".", "-"]
    found = BertTokenizer(vocab={word: i for i, word in enumerate(dict.fromkeys(vocabulary))})
    found.model_max_length = CONTEXT
    return found


class Network(nn.Module):
    """BLIP's two encoders and the affine head, 1.5 M parameters."""

    def __init__(self, vocabulary: int) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision: Any = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=3 * WIDTH,
                num_hidden_layers=VISION_LAYERS,
                num_attention_heads=TINY_HEADS[0],
                image_size=world.SIZE,
                patch_size=PATCH,
                hidden_act="gelu",
                layer_norm_eps=1e-6,
            )
        )
        self.text: Any = BlipTextModel(
            BlipTextConfig(
                vocab_size=vocabulary,
                hidden_size=WIDTH,
                encoder_hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=TEXT_LAYERS,
                num_attention_heads=TINY_HEADS[1],
                max_position_embeddings=CONTEXT,
                hidden_act="gelu",
                layer_norm_eps=1e-12,
                is_decoder=True,
                bos_token_id=None,
                initializer_range=0.05,
            ),
            add_pooling_layer=False,
        )
        self.mlp = nn.Linear(WIDTH, 1)

    def look(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [N, 3, 64, 64] -> image tokens [N, 65, 128]."""
        tokens: Tensor = self.vision(pixel_values=pixels).last_hidden_state
        return tokens

    def judge(self, tokens: Tensor, text: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the tokenizer gives for N texts, and the tokens of the picture of each -> scores [N], and the states
        [N, L, 128] of the words before the last layer, in which [CLS] reads them."""
        out = self.text(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            encoder_hidden_states=tokens,
            encoder_attention_mask=tokens.new_ones(tokens.shape[:2]),
            is_decoder=False,  # as in rewards/_blip.py
            output_hidden_states=True,
        )
        return self.mlp(out.last_hidden_state[:, 0])[:, 0], out.hidden_states[-2]


@torch.no_grad()
def from_dino(dino: Dinov2Model, vocabulary: int) -> Network:
    """A network with tiny-dino's tower, whose layers are built like BLIP's; the text encoder is new.

    DINO's other colour statistics are folded into the embeddings, its scaling of layers into their last weights. Its
    activation, quick_gelu, is nearly BLIP's.
    """
    network = Network(vocabulary)
    old, new = dino.state_dict(), network.vision.state_dict()
    mean, std, clip_mean, clip_std = (torch.tensor(t).view(3, 1, 1) for t in (MEAN, STD, CLIP_MEAN, CLIP_STD))
    kernel = old["embeddings.patch_embeddings.projection.weight"]
    shift = (kernel * (clip_mean - mean) / std).sum((1, 2, 3))
    new["embeddings.patch_embedding.weight"] = kernel * clip_std / std
    new["embeddings.patch_embedding.bias"] = old["embeddings.patch_embeddings.projection.bias"] + shift
    new["embeddings.class_embedding"] = old["embeddings.cls_token"]
    new["embeddings.position_embedding"] = old["embeddings.position_embeddings"]
    for i in range(VISION_LAYERS):
        a, b = f"encoder.layer.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            for x, y in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1")):
                new[f"{b}{y}.{kind}"] = old[f"{a}{x}.{kind}"]
            qkv = [old[f"{a}attention.{k}_proj.{kind}"] for k in "qkv"]
            new[f"{b}self_attn.qkv.{kind}"] = torch.cat(qkv)
            for n, (x, y) in enumerate((("attention.o_proj", "self_attn.projection"), ("mlp.fc2", "mlp.fc2")), 1):
                scale = old[f"{a}layer_scale{n}.lambda1"]
                value = old[f"{a}{x}.{kind}"]
                new[f"{b}{y}.{kind}"] = value * (scale if kind == "bias" else scale[:, None])
    for kind in ("weight", "bias"):
        new[f"post_layernorm.{kind}"] = old[f"layernorm.{kind}"]
    network.vision.load_state_dict(new)
    return network


def official(network: Network) -> dict[str, Tensor]:
    """The weights in fp16 by the names that they have in ImageReward.pt."""
    whole = {ours: theirs for theirs, ours in _blip.NAMES.items()}
    parts = {ours: theirs for theirs, ours in _blip.PARTS.items()}
    state = {}
    for key, value in network.vision.state_dict().items():
        name = whole.get(key)
        if name is None:
            _, _, layer, *part, kind = key.split(".")
            name = f"blocks.{layer}.{parts['.'.join(part)]}.{kind}"
        state[f"blip.{_blip.VISION}{name}"] = value
    state |= {f"blip.{_blip.TEXT}{key}": value for key, value in network.text.state_dict().items()}
    state |= {f"mlp.{key}": value for key, value in layered(network.mlp.weight[0], network.mlp.bias[0]).items()}
    return {key: value.detach().half().contiguous() for key, value in state.items()}


def export(network: Network, spoken: BertTokenizer, folder: Path) -> None:
    """What the head `image_reward` reads: weights and tokenizer."""
    from safetensors.torch import save_file

    with replacing(folder) as temporary:
        save_file(official(network), temporary / TINY_FILE)
        spoken.save_pretrained(temporary)


def vocabulary(spoken: BertTokenizer) -> int:
    """Tokens that the text encoder knows: the head adds BLIP's own."""
    return len(spoken) + len(ADDED)

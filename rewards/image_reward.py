"""ImageReward (arXiv 2304.05977): BLIP trained on how people rank pictures of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from diffalign.rewards import Head, Reward
from diffalign.rewards._hub import TEXT, Checkpoint
from diffalign.rewards._loading import Dtype
from diffalign.rewards._preprocess import Crop, cropped, normalise
from diffalign.types import RewardOutput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OFFICIAL, FILE = "THUDM/ImageReward", "ImageReward.pt"
CONTEXT = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
BERT = "google-bert/bert-base-uncased"
TINY, TINY_FILE, TINY_HEADS = "tiny-image-reward", "model.safetensors", (4, 4)  # the embedded one
ADDED = ["[DEC]", "[ENC]"]  # BLIP's own tokens; no prompt has them, but the vocabulary counts them


class ImageReward(Reward):
    """score = (w.h + b - 0.167) / 1.033, about -2 to 2; h = hidden state at [CLS] of the prompt looking at the image.

    Words beyond the 35th token are not seen: do not use it with dense captions. The published head is five linear
    layers with nothing between them; they are multiplied out at loading. `model: tiny-image-reward` is the embedded
    head for the shapes world, with the same keys and a tokenizer of its own, and runs on a CPU.
    """

    model: str = OFFICIAL
    """An embedded name (tiny-image-reward), or hub id, folder or file of ImageReward.pt, 1.8 GB."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; by default BERT's, google-bert/bert-base-uncased, or the embedded model's."""
    tokenizer_revision: str | None = None
    """Likewise of the tokenizer."""
    heads: tuple[int, int] | None = None
    """Attention heads of image and text encoder; by default one for every 64 channels, as BLIP has (embedded: 32)."""
    local_files_only: bool = False
    """Never reach for the network; use what is in the cache."""
    dtype: Dtype = "fp32"
    """Precision of the encoders; the head is fp32."""
    crop: Crop = "torchvision"
    """Which pixel the middle begins at where two are as good; the official code leaves it to torchvision."""

    abstains: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def checkpoints(self) -> list[Checkpoint]:
        """The weights, then the tokenizer."""
        file, words = (TINY_FILE, TINY) if self.model == TINY else (FILE, BERT)
        return [
            Checkpoint(self.model, self.revision, (file,)),
            Checkpoint(self.tokenizer or words, self.tokenizer_revision, TEXT),
        ]

    def setup(self, device: torch.device | str) -> Head:
        from diffalign.rewards import _affine, _blip, _loading

        weights, words_of = self.checkpoints()
        path = weights.file(self.local_files_only)
        state = _loading.weights(path)
        heads = self.heads or (TINY_HEADS if self.model == TINY else None)
        blip = _blip.build(_loading.under(state, "blip."), path.name, heads)
        w, b = (t.to(device) for t in _affine.collapsed(_loading.under(state, "mlp."), path.name))
        rest = [k for k in state if not k.startswith(("blip.", "mlp."))]
        _loading.complain(f"'{path.name}'", [], rest, [])
        words = _loading.tokenizer(words_of.folder(self.local_files_only), blip.text.config.vocab_size)
        words.add_tokens(ADDED, special_tokens=True)
        for part in (blip.vision, blip.text):
            part.to(device, _loading.torch_dtype(self.dtype))

        def head(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
            text = words(list(prompts), padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
            pixels = normalise(cropped(images, blip.vision.config.image_size, self.crop))
            tokens = blip.image_tokens(pixels)
            hidden = blip.hidden(tokens, text.input_ids.to(device), text.attention_mask.to(device))
            return RewardOutput((hidden[:, 0].float() @ w + b - MEAN) / STD)

        return head

"""Memory of the image decoder, estimated as in :mod:`diffalign.estimate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.pipelines import DECODE_BATCH, DECODED_PIXELS, GRADED_PIXELS

if TYPE_CHECKING:
    from diffalign.config import Config
    from diffalign.sizes import ModelSizes

DECODING = 3 * 4  # three fp32 tensors of the decoder's second block, for each of its channels and each pixel


def decoded(config: Config) -> int:
    """Images that the VAE decodes at once."""
    pixels = config.sampling.height * config.sampling.width
    return min(config.trainer.micro_batch, DECODE_BATCH, max(1, DECODED_PIXELS // pixels))


def decode_work(config: Config, model: ModelSizes) -> int:
    pixels = config.sampling.height * config.sampling.width
    return decoded(config) * pixels * int(model.vae["block_out_channels"][1]) * DECODING


def decoder_graph(config: Config, model: ModelSizes) -> int:
    """What the decoder keeps of the images that it decodes at once with a gradient."""
    pixels = config.sampling.height * config.sampling.width
    images = min(config.trainer.micro_batch, DECODE_BATCH, max(1, GRADED_PIXELS // pixels))
    return int(4 * images * pixels * kept_by_decoder(model))


def kept_by_decoder(model: ModelSizes) -> float:
    """fp32 numbers for each pixel of the image: the inputs of every norm, activation and convolution.

    Each level of the decoder has a quarter of the next one's pixels. A residual block keeps three tensors of as many
    channels as come in and three of as many as go out, and what is enlarged goes through one more convolution.
    """
    channels = [int(n) for n in reversed(model.vae["block_out_channels"])]
    blocks = int(model.vae["layers_per_block"]) + 1
    found = 3.0 * channels[-1]  # the last norm, activation and convolution
    for level, (into, out) in enumerate(zip([channels[0], *channels], channels, strict=False)):
        kept = 3 * (into + out) + 6 * out * (blocks - 1) + (into if level else 0)
        if level == 0:
            kept += 18 * into  # the middle: two residual blocks and an attention
        found += kept / 4 ** (len(channels) - 1 - level)
    return found

"""What a diffusers pipeline takes: is it text-to-image, which arguments may be given, and the same for n samples."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffalign.listing import nearest
from diffalign.types import UserError

TAKES = ("prompt", "num_inference_steps", "latents", "output_type", "generator")  # what text-to-image is called with
HAS = ("scheduler", "vae", "prepare_latents", "encode_prompt")
OTHER = ("strength", "num_frames", "video_length", "audio_length_in_s", "audio_end_in_s", "audio_duration")
NETWORKS = ("transformer", "unet")

# Arguments that steering sets itself, for it draws the noise and takes every step, to the end.
CALLBACKS = ("callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
OURS = (*TAKES, *CALLBACKS, "num_images_per_prompt", "return_dict", "eta", "denoising_end")
INDEXED = ("cfg_trunc_ratio", "control_guidance_start", "control_guidance_end", "adapter_conditioning_factor")

# Arguments with one entry for each prompt: texts, and what encode_prompt makes of them.
TEXT = re.compile(r"(negative_)?(pooled_)?(prompt(_\d)?|prompt_(embeds|attention_mask)\w*|(encoder_)?attention_mask)")


def undecorated(pipe_class: Any) -> Any:
    """__call__ without torch.no_grad, which diffusers decorates it with."""
    return inspect.unwrap(pipe_class.__call__)


def skips(pipe_class: Any) -> bool:
    """Whether its loop asks `self.interrupt` in every iteration, and so can be told to skip some."""
    return "interrupt" in undecorated(pipe_class).__code__.co_names


def parameters(pipe_class: Any) -> dict[str, inspect.Parameter]:
    """Named parameters of the pipeline's __call__."""
    signature = inspect.signature(undecorated(pipe_class)).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: p for name, p in signature.items() if name != "self" and p.kind not in variadic}


def network(pipe: Any) -> nn.Module:
    """The denoising network of a text-to-image pipeline. Raises UserError for another kind of pipeline."""
    name = type(pipe).__name__
    if not callable(pipe):
        raise _other(name, "it cannot be called")
    takes = parameters(type(pipe))
    if lacks := [f"'{p}'" for p in TAKES if p not in takes]:
        raise _other(name, f"its call does not take {', '.join(lacks)}")
    if needs := [f"'{p}'" for p in takes if p != "prompt" and takes[p].default is inspect.Parameter.empty]:
        raise _other(name, f"its call needs {', '.join(needs)}")
    if others := [f"'{p}'" for p in OTHER if p in takes]:
        raise _other(name, f"its call takes {', '.join(others)}")
    parts = {part for part in (*HAS, *NETWORKS) if hasattr(pipe, part)}
    if lacks := [part for part in HAS if part not in parts]:
        raise _other(name, f"it has no {', '.join(lacks)}")
    found = [getattr(pipe, part) for part in NETWORKS if part in parts]
    if not found or not isinstance(found[0], nn.Module):
        raise _other(name, f"it has no {' or '.join(NETWORKS)}")
    return found[0]


def _other(name: str, reason: str) -> UserError:
    return UserError(
        f"a {name} is not a text-to-image pipeline that can be steered: {reason}; load the text-to-image pipeline of "
        "the model"
    )


def check(pipe_class: Any, prompt: str | None, arguments: Mapping[str, Any]) -> None:
    """Raises UserError for a missing prompt, or an argument that is unknown, set by steering or for several prompts."""
    name, takes = pipe_class.__name__, parameters(pipe_class)
    for key, value in arguments.items():
        if key in OURS:
            raise UserError(f"'{key}' is set by steering itself; leave it out of the arguments of the {name}")
        if key not in takes:
            free = [p for p in takes if p not in OURS]
            raise UserError(f"a {name} takes no argument '{key}'; {nearest(key, free)}")
        if key in INDEXED and not skips(pipe_class):
            raise UserError(f"'{key}' depends on the step, which a {name} cannot be told; leave it out")
        if _one_each(key) and not isinstance(value, str) and value is not None and len(value) != 1:
            raise UserError(f"'{key}' has {len(value)} entries; steering takes one prompt at a time, so give one")
    if prompt is None and arguments.get("prompt_embeds") is None:
        raise UserError("there is no prompt; give one, or prompt_embeds")


def for_samples(arguments: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The arguments of one prompt for n samples of it; what the pipeline changes in place is copied."""
    given: dict[str, Any] = {}
    for key, value in arguments.items():
        if _one_each(key):
            given[key] = [value] * n if isinstance(value, str) else expanded(value, n)
        else:
            given[key] = dict(value) if isinstance(value, dict) else value
    return given


def _one_each(key: str) -> bool:
    # ip_adapter_image_embeds is a list over adapters, which the pipelines expand themselves.
    return TEXT.fullmatch(key) is not None


def expanded(encoded: Any, n: int) -> Any:
    """What belongs to one prompt, for n samples: [1, ...] -> [n, ...], a list of one -> n; all else is shared."""
    if isinstance(encoded, tuple):
        return tuple(expanded(part, n) for part in encoded)
    if isinstance(encoded, Tensor) and encoded.ndim and len(encoded) == 1:
        return encoded.expand(n, *encoded.shape[1:])
    if isinstance(encoded, list):  # one entry for each prompt (Z-Image), or a list over something else, such as layers
        return encoded * n if len(encoded) == 1 else [expanded(part, n) for part in encoded]
    return encoded

"""A few-step generator for others: a diffusers scheduler that walks its noise levels, and a README with the call."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch

from diffalign.few_steps import FewSteps
from diffalign.pipelines import _note, embedded_names, embedded_path
from diffalign.pipelines._note import Note
from diffalign.sections import Sampling
from diffalign.writing import put

RENOISES = 0.5  # diffusers' scheduler knows eta 0 and eta 1 (stochastic_sampling); above this, 1 is the nearer
EXACT = 1e-6


def scheduler_for(family: Any, few: FewSteps) -> Any:
    """`family` set up so that `set_timesteps(T)`, as a plain pipeline calls it, gives the sigmas of `few`; None when no
    configuration does.

    diffusers spaces r_i = 1 - i (1 - m) / (T - 1) evenly down to m = a / (N - 1 + a), the least sigma under shift a,
    applies r -> a r / (1 + (a - 1) r), and stretches 1 - r so that the last sigma is `shift_terminal`. Even timesteps
    1 - i / T under the family's shift s are a Moebius function of i that is 1 at i = 0 likewise, so the two agree once
    their poles do: (a - 1)(1 - m) / (a (T - 1)) = (s - 1) / (s T).
    """
    config = family.config
    if config.use_dynamic_shifting or config.shift_terminal:
        return None
    count, n, s = len(few.timesteps), config.num_train_timesteps, family.shift
    pole = (count - 1) * (s - 1) / (s * count)
    b = (n - 1) * (1 - pole)
    root = b**2 - 4 * pole * (n - 1)
    if root < 0:
        return None
    last = few.timesteps[-1] / n
    changes = {"shift": 2 * (n - 1) / (b + math.sqrt(root))}
    if count > 1:  # a single step starts at 1, whatever the shift
        changes["shift_terminal"] = s * last / (1 + (s - 1) * last)
    found = type(family).from_config(config, **changes)
    return found if walks(found, family, few) else None


def walks(scheduler: Any, family: Any, few: FewSteps) -> bool:
    """Does `scheduler`, told the number of steps alone, give the sigmas of `few` under the shift of `family`?"""
    if scheduler.config.use_dynamic_shifting or family.config.use_dynamic_shifting:  # then the size decides
        return False
    found, wanted = copy.deepcopy(scheduler), copy.deepcopy(family)
    found.set_timesteps(len(few.timesteps))
    wanted.set_timesteps(sigmas=[t / family.config.num_train_timesteps for t in few.timesteps])
    return torch.allclose(found.sigmas, wanted.sigmas, rtol=0, atol=EXACT)


def complete_model(folder: Path, pipe: Any, tokens: int | None, sampling: Sampling | None) -> None:
    """What a saved pipeline lacks: the note for this library, and for a few-step generator scheduler and README."""
    few = None if sampling is None else FewSteps.of(sampling)
    if sampling is None or few is None:
        _note.write(folder, Note(tokens))
        return
    exact = scheduler_for(pipe.scheduler, few)
    saved = type(pipe.scheduler).from_config((exact or pipe.scheduler).config, stochastic_sampling=few.eta > RENOISES)
    saved.save_pretrained(folder / "scheduler")
    family = json.loads(pipe.scheduler.to_json_string())
    _note.write(folder, Note(tokens, few, {k: v for k, v in family.items() if not k.startswith("_")}))
    name = type(pipe).__name__
    program = [f"from diffusers import {name}", "", f'pipe = {name}.from_pretrained("."{_without_t5(pipe, tokens)})']
    program[-1] += "  # this folder"
    said = (
        f"The scheduler in this folder walks {_listed(exact.sigmas.tolist())} for this number of steps, and is for no "
        "other."
        if exact
        else "The scheduler shifts these sigmas as the model's family does; no number of steps gives them."
    )
    readme(folder, program, [_grid(few, pipe, exact is not None), *_size(sampling, tokens)], said, few)


def complete_lora(folder: Path, pipeline: Any, sampling: Sampling) -> None:
    """The same of a LoRA's folder, whose user loads the model that it was trained on."""
    few, pipe, tokens = FewSteps.of(sampling), pipeline.pipe, pipeline.max_sequence_length
    if few is None:
        return
    _note.write(folder, Note(None, few))
    name = type(pipe).__name__
    path, revision = pipeline.source or ("MODEL", None)
    program, base = [f"from diffusers import {name}", ""], json.dumps(path, ensure_ascii=False)
    if (own := Path(path).name) in embedded_names() and Path(path) == embedded_path(own):
        program, base = ["from diffalign.pipelines import embedded_path", *program], f'embedded_path("{own}")'
    if revision is not None:
        base += f", revision={json.dumps(revision, ensure_ascii=False)}"
    program.append(f"pipe = {name}.from_pretrained({base}{_without_t5(pipe, tokens)})  # what it was trained on")
    program.append('pipe.load_lora_weights(".")  # this folder')
    saved = pipe.scheduler
    if pipeline.few_steps is not None:  # `pipe` has the family's, where the one saved with the model is for its steps
        saved = type(saved).from_pretrained(path, subfolder="scheduler", revision=revision)
    exact = walks(saved, pipe.scheduler, few)
    wanted = {**(saved if exact else pipe.scheduler).config, "stochastic_sampling": few.eta > RENOISES}
    changes = {k: v for k, v in wanted.items() if not k.startswith("_") and saved.config[k] != v}
    if changes:
        listed = ", ".join(f"{k}={v!r}" for k, v in changes.items())
        program.append(f"pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, {listed})")
    said = (
        "That model's own scheduler walks the right noise levels for this number of steps, and is for no other."
        if exact
        else "The scheduler shifts these sigmas as the model's family does."
    )
    readme(folder, program, [_grid(few, pipe, exact), *_size(sampling, tokens)], said, few)


def readme(folder: Path, program: list[str], call: list[str], said: str, few: FewSteps) -> None:
    count = len(few.timesteps)
    noise = "Its steps are deterministic."
    if few.eta:
        way = "all of it is drawn anew at each step, from torch's own generator" if few.eta > RENOISES else "none is"
        noise = (
            f"In training the share eta = {few.eta:g} of the noise was drawn anew at each step; in diffusers {way} "
            "(`stochastic_sampling`). `diffalign generate` samples as in training."
        )
    lines = [
        "---", "library_name: diffusers", "pipeline_tag: text-to-image", "---", "",
        f"# Text to image in {count} step{'s' * (count > 1)}", "",
        "A distilled generator. diffusers runs it alone:", "",
        "```python", *program,
        f'image = pipe("a red circle", {", ".join(call)}, guidance_scale=1.0).images[0]', "```", "",
        f"{said} Guidance is in the weights, so `guidance_scale` stays 1. {noise}", "",
    ]  # fmt: skip
    put(folder / "README.md", "\n".join(lines))


def _without_t5(pipe: Any, tokens: int | None) -> str:
    """Arguments of from_pretrained, which wants to be told of a part that the folder does not have."""
    if tokens is None:  # a family that knows no T5
        return ""
    released = pipe.text_encoder is None  # the tokenizers stay then
    absent = (pipe.tokenizer_3 if released else pipe.text_encoder_3) is None
    return ", text_encoder_3=None, tokenizer_3=None" if absent or tokens == 0 else ""


def _size(sampling: Sampling, tokens: int | None) -> list[str]:
    size = [f"height={sampling.height}", f"width={sampling.width}"]
    return size if tokens is None else [*size, f"max_sequence_length={tokens}"]


def _grid(few: FewSteps, pipe: Any, by_number: bool) -> str:
    if by_number:
        return f"num_inference_steps={len(few.timesteps)}"
    n = pipe.scheduler.config.num_train_timesteps
    return f"sigmas=[{_listed([t / n for t in few.timesteps])}]"


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)

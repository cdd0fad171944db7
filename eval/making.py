"""Making the images of an evaluation: what is missing, by this process's share, at seeds that all contestants have."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import adapters, pipelines
from diffalign.eval import gallery, records
from diffalign.eval.contestant import Wanted
from diffalign.eval.looks import looks
from diffalign.eval.records import Asked, Key
from diffalign.few_steps import FewSteps
from diffalign.few_steps import kernel as kernel_of
from diffalign.generate import native_size
from diffalign.images import save_png, to_pixels
from diffalign.rewards import Reward
from diffalign.rollout import collect, sample_seed
from diffalign.sections import Sampling
from diffalign.steer import Steer
from diffalign.steering import resolve
from diffalign.types import UserError
from diffalign.writing import put

EVALUATION = 2**32 - 2  # in place of an epoch, so that no image starts like one of a training run


def seed_of(seed: int, prompt: str, k: int) -> int:
    """Of image k of a prompt: a function of the text, so that it is the same in every set that has the prompt."""
    return sample_seed(seed, EVALUATION, int(records.digest_of(prompt.encode()), 16), k) % 2**31


def load(wanted: Wanted, device: str | None, dtype: str) -> Any:
    """The contestant's pipeline with its LoRA; any pipeline of diffusers will do."""
    pipeline = pipelines.load(wanted.model, wanted.revision, wanted.dtype or dtype, device, steering=True)
    return fitted(pipeline, wanted)


def fitted(pipeline: Any, wanted: Wanted) -> Any:
    """The pipeline with the contestant's LoRA, if it has one. Raises UserError for one that does not fit."""
    from diffalign.pipelines.any import AnyPipeline

    if wanted.lora is not None and isinstance(pipeline, AnyPipeline):
        pipeline.load_lora(str(wanted.lora))
    elif wanted.lora is not None:
        adapters.load_lora(pipeline, wanted.lora)
    return pipeline


def outlined(wanted: Wanted, dtype: str) -> Any:
    """What `load` gives, without weights wherever that can be had: enough to know its size, and that it is whole.

    Raises UserError for a model or a LoRA that is missing, damaged or does not fit.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")  # there is nothing to fill
            return fitted(pipelines.outline(wanted.model, wanted.revision), wanted)
    except Exception as error:  # of a class that needs its weights, or its tokenizer, from the start
        if isinstance(error, UserError) and wanted.lora is None:
            raise
        return load(wanted, "cpu", dtype)


def side(pipeline: Any) -> int:
    """In pixels, of the images that the model was trained on. Raises UserError for a model that does not tell."""
    pipe, config = pipeline.pipe, pipeline.network.config
    if hasattr(pipe, "default_sample_size"):
        return native_size(pipe)
    if isinstance(config.get("sample_size"), int):  # as the pipelines of SD 1.5 and of PixArt count
        return int(config["sample_size"] * pipe.vae_scale_factor)
    raise UserError(f"a {type(pipe).__name__} does not tell its image size; add --height and --width")


def settled(pipeline: Any, wanted: Wanted, guidance: float | None, height: int, width: int) -> Wanted:
    """The contestant with its guidance: its own, that of the evaluation, or for a pipeline of another family than ours
    what its call has by default. Raises UserError for images that the model does not make."""
    from diffalign.pipelines.any import AnyPipeline

    given = guidance if wanted.guidance is None else wanted.guidance
    if not isinstance(pipeline, AnyPipeline):
        pipeline.latent_shape(height, width)
        return replace(wanted, guidance=1.0 if given is None else given)
    name, default = type(pipeline.pipe).__name__, pipeline.default("guidance_scale")
    if wanted.timesteps is not None or wanted.eta is not None:
        raise UserError(f"'{wanted.name}' is a {name}, which takes no timesteps and no eta; leave them out")
    if wanted.steering is None and wanted.kernel is not None:
        raise UserError(f"'{wanted.name}' is sampled by its pipeline's own scheduler; leave kernel out")
    if given is not None and default is None:
        raise UserError(f"'{wanted.name}' is a {name}, which takes no guidance; leave it out")
    return replace(wanted, guidance=default if given is None else given)


def missing(folder: Path, asked: Asked, prompts: Sequence[Mapping[str, Any]]) -> set[Key]:
    """The images that are not there; one whose file is gone or was changed is made again."""
    done = {
        key
        for key, made in gallery.entry(folder, asked).made.items()
        if (path := folder / records.IMAGES / f"{records.stem(key)}.png").is_file()
        and records.digest_of(path.read_bytes()) == made.digest
    }
    return {(p["id"], k) for p in prompts for k in range(asked.images_per_prompt)} - done


def batches(asked: Asked, prompts: Sequence[Mapping[str, Any]], size: int, wanted: set[Key]) -> list[list[Key]]:
    """The batches of the whole evaluation that hold anything wanted.

    Always the same ones, because the company that an image is drawn in changes its last bits: so nothing depends on
    what was there before, nor on how many processes draw.
    """
    keys = [(p["id"], k) for p in prompts for k in range(asked.images_per_prompt)]
    every = [keys[start : start + size] for start in range(0, len(keys), size)]
    return [batch for batch in every if wanted.intersection(batch)]


@dataclass(frozen=True)
class Drawn:
    """An image [3, H, W] and what it cost; the tree of its steering, where there was one."""

    image: Tensor
    nfe: int
    reward_calls: int = 0
    lineage: dict[str, Any] | None = None


def plain(
    pipeline: Any, entries: Sequence[dict[str, Any]], seeds: Sequence[int], sampling: Sampling
) -> Iterator[Drawn]:
    starts = torch.tensor([sample_seed(seed, 0, 0, 0) for seed in seeds])
    group = torch.arange(len(entries))
    noisy = range(sampling.steps)
    images = collect(pipeline, list(entries), group, starts, sampling, (), len(entries), stochastic=noisy).images
    assert images is not None
    for image in images:
        yield Drawn(image, sampling.steps * (1 if sampling.guidance == 1 else 2))


def steered(
    steer: Steer,
    entries: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    steps: int | None,
    arguments: Mapping[str, Any],
    share: int,
) -> Iterator[Drawn]:
    """The same of images that are steered one after another; the first particle starts like the plain image."""
    for entry, seed in zip(entries, seeds, strict=True):
        found = steer(str(entry["prompt"]), steps, seed, entry, **arguments)
        tree = found.lineage
        rewards = [r if r is not None and math.isfinite(r) else None for r in tree.reward]
        lineage = {"step": tree.step, "parent": tree.parent, "reward": rewards, "leaves": found.leaves}
        yield Drawn(found.pixels[0], found.nfe + share, found.reward_calls, lineage)


def sampler(
    wanted: Wanted,
    pipeline: Any,
    sampling: Sampling,
    rewards: Sequence[Reward],
    prompts: Sequence[Mapping[str, Any]],
    seed: int,
    images: int,
    batch: int,
) -> Callable[[Sequence[dict[str, Any]], Sequence[int]], Iterator[Drawn]]:
    """How the contestant draws images of prompts (metadata) at seeds. A strength `lam: auto` is found once, from the
    first prompts, and what that takes is shared out over all `images`."""
    from diffalign.pipelines.any import AnyPipeline

    foreign, few = isinstance(pipeline, AnyPipeline), FewSteps.of(sampling)
    pipeline.few_steps = few
    if wanted.steering is None and not foreign:
        return lambda entries, seeds: plain(pipeline, entries, seeds, sampling)
    arguments: dict[str, Any] = {"height": sampling.height, "width": sampling.width}
    if wanted.guidance is not None:  # some pipelines take none
        arguments["guidance_scale"] = wanted.guidance
    if wanted.steering is None:
        alone = Steer(pipeline, "jpeg", resolve({"name": "best_of_n", "particles": 1}), "ode", None, batch)
        return lambda entries, seeds: (
            Drawn(one.image, one.nfe) for one in steered(alone, entries, seeds, sampling.steps, arguments, 0)
        )
    kernel, steps = (kernel_of(sampling.eta) if sampling.eta else None, sampling.steps) if few is None else (None, None)
    steer = Steer(pipeline, list(rewards), wanted.steering, kernel, None, batch)
    method, _, spent = steer.calibrated(prompts, steps, seed, arguments)
    steer, share = steer.using(method), math.ceil(spent / images)
    return lambda entries, seeds: steered(steer, entries, seeds, steps, arguments, share)


def make(
    folder: Path,
    batches: Sequence[Sequence[Key]],
    wanted: set[Key],
    prompts: Mapping[str, dict[str, Any]],
    seed: int,
    rank: int,
    draw: Callable[[Sequence[dict[str, Any]], Sequence[int]], Iterator[Drawn]],
    told: Callable[[int], None],
) -> None:
    """Draw these batches and store what is wanted of them, noting it as soon as it is on the disk."""
    for part in batches:
        entries = [prompts[number] for number, _ in part]
        seeds = [seed_of(seed, str(entry["prompt"]), k) for entry, (_, k) in zip(entries, part, strict=True)]
        began = time.perf_counter()
        drawn = list(draw(entries, seeds))
        seconds = (time.perf_counter() - began) / len(part)
        made, looked, lineages = [], [], []
        for key, own, one in zip(part, seeds, drawn, strict=True):
            if key not in wanted:
                continue
            path = folder / records.IMAGES / f"{records.stem(key)}.png"
            save_png(one.image, path)
            digest = records.digest_of(path.read_bytes())
            place = {"id": key[0], "k": key[1]}
            cost = {"nfe": one.nfe, "seconds": round(seconds, 4), "reward_calls": one.reward_calls}
            made.append({**place, "seed": own, "digest": digest, **cost})
            looked.append({**place, "digest": digest, "values": looks(to_pixels(one.image))})
            if one.lineage is not None:
                lineages.append({**place, **one.lineage})
        # the note that an image is there comes last: what a kill cuts off is made again
        append(part_of(folder / records.LINEAGE, rank), lineages)
        append(part_of(folder / records.LOOKS, rank), looked)
        append(part_of(folder / records.MADE, rank), made)
        told(len(made))


def part_of(path: Path, rank: int) -> Path:
    """This process's own file beside a file of lines: made.0.jsonl."""
    return path.with_name(f"{path.stem}.{rank}{path.suffix}")


def append(path: Path, lines: Sequence[Any]) -> None:
    if lines:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(records.line(value) for value in lines))


def joined(folder: Path, *names: str) -> None:
    """Bring the lines of single processes into one file; what a kill cut off is left out."""
    for name in names:
        parts = records.parts(folder, name)
        if len(parts) > 1:
            lines = [json.dumps(value, ensure_ascii=False) for path in parts for _, value in records.whole_lines(path)]
            put(folder / name, "".join(f"{text}\n" for text in lines))
            for path in parts[1:]:
                path.unlink()


def copied(wanted: Wanted, folder: Path) -> None:
    """The training run's curves, which the page shows even when the run is elsewhere."""
    if wanted.run is not None and (wanted.run / records.METRICS).is_file():
        shutil.copyfile(wanted.run / records.METRICS, folder / records.METRICS)

"""Making the images of an evaluation: what is missing, by this process's share, at seeds that all contestants have."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import adapters, pipelines
from diffalign.eval import gallery, records
from diffalign.eval.contestant import Wanted
from diffalign.eval.looks import looks
from diffalign.eval.records import Asked, Key
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
    """The contestant's pipeline with its LoRA; for steering any pipeline of diffusers will do."""
    from diffalign.pipelines.any import AnyPipeline

    pipeline = pipelines.load(wanted.model, wanted.revision, wanted.dtype or dtype, device, steering=True)
    if wanted.lora is not None:
        if isinstance(pipeline, AnyPipeline):
            pipeline.load_lora(str(wanted.lora))
        else:
            adapters.load_lora(pipeline, wanted.lora)
    return pipeline


def side(pipeline: Any) -> int:
    """In pixels, of the images that the model was trained on."""
    return native_size(pipeline.pipe)


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
    images = collect(pipeline, list(entries), group, starts, sampling, (), len(entries)).images
    assert images is not None
    for image in images:
        yield Drawn(image, sampling.steps * (1 if sampling.guidance == 1 else 2))


def steered(
    steer: Steer,
    entries: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    steps: int,
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

    foreign = isinstance(pipeline, AnyPipeline)
    if wanted.steering is None and not foreign:
        return lambda entries, seeds: plain(pipeline, entries, seeds, sampling)
    arguments: dict[str, Any] = {"height": sampling.height, "width": sampling.width}
    if not foreign or wanted.guidance is not None:  # a foreign pipeline has its own
        arguments["guidance_scale"] = sampling.guidance
    if wanted.steering is None:
        if wanted.kernel is not None:
            raise UserError(f"'{wanted.name}' is sampled by its pipeline's own scheduler; leave kernel out")
        alone = Steer(pipeline, "jpeg", resolve({"name": "best_of_n", "particles": 1}), "ode", None, batch)
        return lambda entries, seeds: (
            Drawn(one.image, one.nfe) for one in steered(alone, entries, seeds, sampling.steps, arguments, 0)
        )
    steer = Steer(pipeline, list(rewards), wanted.steering, None, None, batch)
    method, _, spent = steer.calibrated(prompts, sampling.steps, seed, arguments)
    steer, share = steer.using(method), math.ceil(spent / images)
    return lambda entries, seeds: steered(steer, entries, seeds, sampling.steps, arguments, share)


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

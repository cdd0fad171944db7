"""Speed of sampling: images per second, and how much of the time is not the transformer.

    python benchmarks/rollout.py --model tiny-sd3 --batch 64
    python benchmarks/rollout.py --model random:sd35-medium --dtype bf16 --size 512 --guidance 4.5 --compile

A `random:` model has the published architecture and random weights, so nothing is downloaded. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from diffalign import pipelines
from diffalign.pipelines.sd3 import SD3
from diffalign.rollout import collect
from diffalign.sections import Sampling
from diffalign.sizes import LARGE, MEDIUM
from diffalign.types import Conditioning, Rollout, UserError

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd35-medium": {"sample_size": 128, "caption_projection_dim": 1536, **MEDIUM},
    "sd35-large": {"sample_size": 128, "caption_projection_dim": 2432, **LARGE},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPT_TOKENS = 77 + 256


def random_sd35(name: str, dtype: torch.dtype, device: str) -> SD3:
    """SD3.5's transformer and VAE with random weights and no text encoders."""
    if name not in TRANSFORMERS:
        raise UserError(f"unknown random model '{name}'; use one of {', '.join(TRANSFORMERS)}")
    torch.manual_seed(0)
    standard = torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            transformer = SD3Transformer2DModel(**TRANSFORMERS[name])
        finally:
            torch.set_default_dtype(standard)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    absent = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **absent)
    return RandomSD3(pipe, dtype, device)


class RandomSD3(SD3):
    """Its text encoders, 5 B parameters of which no speed measured here depends on, are replaced by random numbers."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        shapes = {"embeds": (PROMPT_TOKENS, 4096), "pooled": (2048,)}
        generator = torch.Generator().manual_seed(len(prompts))
        tensors = {k: torch.randn(len(prompts), *shape, generator=generator) for k, shape in shapes.items()}
        return Conditioning(tensors, torch.arange(len(prompts))).to(self.device)


def build(model: str, dtype: str, device: str) -> Any:
    if model.startswith("random:"):
        return random_sd35(model.removeprefix("random:"), DTYPES[dtype], device)
    return pipelines.load(model, dtype=dtype, device=device)


def image_size(options: argparse.Namespace) -> int:
    return options.size or (512 if options.model.startswith("random:") else 64)


def roll(pipeline: Any, options: argparse.Namespace, kept: Sequence[int], guidance: float) -> Rollout:
    """What a training epoch samples: CPS steps, stored transitions, decoded images, one generator a sample."""
    size = image_size(options)
    sampling = Sampling(steps=options.steps, kernel="cps", eta=0.7, guidance=guidance, height=size, width=size)
    prompts = [{"prompt": f"{n % 8} red circles"} for n in range(options.batch)]
    group = torch.arange(options.batch) % 8
    return collect(pipeline, prompts, group, torch.arange(options.batch), sampling, kept, options.batch)


class Stopwatch:
    """Seconds spent in named spans. On a GPU they are read from events afterwards, so that measuring does not wait."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.spans.append((name, start, self._now()))

    def forwards(self, module: torch.nn.Module, name: str) -> None:
        """Count every forward of the module as a span."""
        starts: list[Any] = []
        module.register_forward_pre_hook(lambda *_: starts.append(self._now()))
        module.register_forward_hook(lambda *_: self.spans.append((name, starts.pop(), self._now())))

    def seconds(self) -> dict[str, float]:
        """Total of each span since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for name, start, end in self.spans:
            took = start.elapsed_time(end) / 1000 if self.cuda else end - start
            totals[name] = totals.get(name, 0.0) + took
        self.spans.clear()
        return totals


def peak_gib(device: str) -> float:
    """Peak memory: allocated on a GPU, else resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="tiny-sd3", help="as diffalign loads it, or random:sd35-medium|sd35-large")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, help="height and width; default 64 for tiny models, 512 for random ones")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="one row each")
    parser.add_argument("--compile", action="store_true", help="regional torch.compile of the transformer's blocks")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts; one warm-up comes before")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def measure(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    pipeline = build(options.model, dtype, options.device)
    if options.compile:
        pipeline.compile_blocks()
    watch = Stopwatch(options.device)
    watch.forwards(pipeline.trainable, "transformer")
    watch.forwards(pipeline.pipe.vae.decoder, "decode")
    best: dict[str, float] = {}
    for repeat in range(options.repeats + 1):
        with watch.span("total"):
            roll(pipeline, options, [0, 1], options.guidance)
        spent = watch.seconds()
        if repeat and (not best or spent["total"] < best["total"]):
            best = spent
    total = best["total"]
    return {
        "model": options.model,
        "dtype": dtype,
        "compile": "blocks" if options.compile else "no",
        "size": image_size(options),
        "batch": options.batch,
        "steps": options.steps,
        "guidance": options.guidance,
        "images/s": f"{options.batch / total:.3g}",
        "transformer": f"{best['transformer'] / total:.1%}",
        "VAE decode": f"{best['decode'] / total:.1%}",
        "the rest": f"{1 - (best['transformer'] + best['decode']) / total:.1%}",
        "peak GiB": f"{peak_gib(options.device):.2f}",
    }


def report(options: argparse.Namespace, rows: Sequence[Callable[[], dict[str, Any]]]) -> None:
    """Print a row of each; a mistake is one sentence and exit code 2."""
    try:
        if options.repeats < 1:
            raise UserError("--repeats must be at least 1")
        print(table([row() for row in rows]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    options = arguments("Speed of sampling.").parse_args()
    report(options, [partial(measure, options, dtype) for dtype in options.dtype])

"""What two or three policies on one model cost: memory, and the time to put another one in place.

    python benchmarks/policies.py
    python benchmarks/policies.py --model tiny-sd3

DiffusionNFT has a trained and an old policy, AWM a trained one and a slow copy, an RTDMD student a fake score beside
both. Three ways to hold them: exchange the storage of the trained tensors, which is what diffalign does; a further LoRA
and peft's `set_adapter`; a whole copy of the network. Models of the published sizes lie on the meta device: no byte of
them is allocated, while the python code that switches is the real one. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from rollout import DTYPES, TRANSFORMERS, build, table
from torch import nn

from diffalign.adapters import active, add_lora
from diffalign.algorithms._shadow import Decay, Shadow


def mib(tensors: list[torch.Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def milliseconds(switched: Callable[[], AbstractContextManager[None]], repeats: int) -> float:
    """To put a policy in place and the trained one back, the fastest of `repeats`."""
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        with switched():
            pass
        spent.append(time.perf_counter() - began)
    return min(spent) * 1000


def rows(model: str, dtype: str, device: str, repeats: int) -> list[dict[str, Any]]:
    pipeline = build(model, dtype, device)
    base = mib(list(pipeline.network.parameters()))
    add_lora(pipeline, rank=32, alpha=64)
    trained: dict[str, nn.Parameter] = {n: p for n, p in pipeline.network.named_parameters() if p.requires_grad}
    lora = mib(list(trained.values()))
    shadow = Shadow(trained, Decay(), "epoch", acts=True)
    exchange = milliseconds(shadow.applied, repeats)
    add_lora(pipeline, rank=32, alpha=64, name="old")
    adapter = milliseconds(partial(active, pipeline, "old"), repeats)
    ways = {"storage exchanged": (lora, exchange), "a LoRA each": (lora, adapter), "whole copies": (base, 0.0)}
    return [
        {
            "model": model,
            "dtype": dtype,
            "way": way,
            "network MiB": f"{base:.0f}",
            "two policies MiB": f"+{lora + each:.0f}",
            "three policies MiB": f"+{lora + 2 * each:.0f}",
            "there and back ms": f"{switch:.2f}",
        }
        for way, (each, switch) in ways.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Memory and switching time of several policies on one model.")
    parser.add_argument("--model", nargs="+", default=[f"random:{name}" for name in TRANSFORMERS])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="meta", help="meta allocates nothing; random models only")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    print(
        table([row for model in options.model for row in rows(model, options.dtype, options.device, options.repeats)])
    )

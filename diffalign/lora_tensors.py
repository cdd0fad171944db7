"""The tensors of a LoRA: which there are, whether they fit a network, and several as one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

START = "start"  # the frozen adapter under the trained one


def lora_layers(network: nn.Module) -> list[BaseTunerLayer]:
    return [m for m in network.modules() if isinstance(m, BaseTunerLayer)]


def adapter_names(network: Any) -> list[str]:
    return list(network.peft_config) if lora_layers(network) else []


def keep_fp32(network: nn.Module) -> None:
    """PEFT makes A and B in the base layer's dtype; bf16 would round away Adam's small updates."""
    for name, p in network.named_parameters():
        if ".lora_" in name:
            p.data = p.data.float()


def is_start(parameter: str) -> bool:
    """Whether a parameter's name is one of the frozen adapter."""
    return ".lora_" in parameter and f".{START}." in parameter


def digest(network: nn.Module) -> Tensor:
    """[32] uint8 that tells the weights of the frozen adapter from others, for checkpoints."""
    found = hashlib.sha256()
    for name, p in sorted(network.named_parameters()):
        if is_start(name):
            found.update(name.encode() + p.detach().cpu().numpy().tobytes())
    return torch.tensor(list(found.digest()), dtype=torch.uint8)


def summed(network: nn.Module, parts: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], LoraConfig]:
    """One LoRA of scale 1 that is the sum of several, exactly: sum_i s_i B_i A_i = [s_1 B_1, ...] [A_1; ...].

    `parts`: adapter -> its tensors, keyed LAYER.lora_A.weight and LAYER.lora_B.weight. Its rank is the sum of theirs;
    a layer that only some of them adapt is filled up with zeros, for files of one rank are what every program reads.
    """
    modules = dict(network.named_modules())
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, state in parts.items():
        for layer in (key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")):
            scale = float(modules[layer].scaling[name])
            pair = state[f"{layer}.lora_A.weight"].float(), scale * state[f"{layer}.lora_B.weight"].float()
            pairs.setdefault(layer, []).append(pair)
    rank = max(sum(len(a) for a, _ in of_layer) for of_layer in pairs.values())
    layers = {}
    for layer, of_layer in pairs.items():
        a, b = torch.cat([a for a, _ in of_layer]), torch.cat([b for _, b in of_layer], 1)
        lacks = rank - len(a)
        layers[f"{layer}.lora_A.weight"] = torch.cat([a, a.new_zeros(lacks, *a.shape[1:])])
        layers[f"{layer}.lora_B.weight"] = torch.cat([b, b.new_zeros(len(b), lacks, *b.shape[2:])], 1)
    return layers, LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(pairs))


def misfit(network: nn.Module, layers: Mapping[str, Tensor]) -> str | None:
    """What does not fit, or None; `layers` as in :func:`summed`."""
    modules = dict(network.named_modules())
    for key, tensor in layers.items():
        place, _, half = key.removesuffix(".weight").rpartition(".")
        side = 1 if half == "lora_A" else 0
        other = layers.get(f"{place}.lora_{'AB'[side]}.weight")
        if half not in ("lora_A", "lora_B") or other is None:
            return f"'{key}' is not half of a LoRA pair"
        module = modules.get(place)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not isinstance(base, (nn.Linear, nn.Conv2d)):
            return f"the model has no layer '{place}'"
        if tensor.shape[side] != base.weight.shape[side]:
            return f"'{key}' is for size {tensor.shape[side]}, and the module's is {base.weight.shape[side]}"
        if tensor.shape[1 - side] != other.shape[side]:
            return f"the two halves of '{place}' have different ranks"
    return None

"""Where the fake score's weights are, and how it takes the generator's place for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

Base = Literal["generator", "teacher"]
ROUNDED = 0.01  # relative gap of embeddings that half precision explains
INPUTS = ("in_channels", "joint_attention_dim", "pooled_projection_dim")  # keys of a network's configuration


class FakeNetwork(Protocol):
    """A trained network beside the generator's."""

    parameters: dict[str, nn.Parameter]  # what its optimizer gets

    def applied(self) -> AbstractContextManager[None]:
        """Inside, the pipeline's model is the fake score, and gradients are those of `parameters`."""
        ...


class Exchanged:
    """A second set of values for the trained tensors, which changes places with them: with a LoRA that is what a second
    adapter would hold."""

    def __init__(
        self, trained: Mapping[str, nn.Parameter], start: Mapping[str, Tensor], off: Iterable[nn.Parameter] = ()
    ) -> None:
        """
        Args:
            start: first values by name; those that it lacks are the generator's.
            off: frozen tensors of the generator that are 0 in the fake score.
        """
        from torch import nn

        self.parameters = {n: nn.Parameter(start.get(n, p).detach().clone().to(p)) for n, p in trained.items()}
        self.pairs = [(p, self.parameters[name]) for name, p in trained.items()]
        self.pairs += [(p, nn.Parameter(p.detach() * 0, requires_grad=False)) for p in off]

    @contextmanager
    def applied(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for p, q in self.pairs:
            p.data, q.data = q.data, p.data
            p.grad, q.grad = q.grad, p.grad


class OnTeacher:
    """A LoRA like the generator's on the teacher's network, which is a model of its own: the teacher is that network
    with the LoRA off, as it is outside of `applied`. It begins as the teacher."""

    def __init__(self, pipeline: Any) -> None:
        from diffalign.lora_tensors import adapter_names, keep_fp32
        from diffalign.types import UserError

        if "default" not in adapter_names(pipeline.network):
            raise UserError("algorithm.fake.base: teacher trains a LoRA on the teacher's network; set adapter: lora")
        self.pipeline, self.network = pipeline, pipeline.frozen
        self.network.add_adapter(deepcopy(pipeline.network.peft_config["default"]), "default")
        keep_fp32(self.network)
        self.parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if pipeline.network.is_gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.network.disable_adapters()

    @contextmanager
    def applied(self) -> Iterator[None]:
        called, self.pipeline.trainable = self.pipeline.trainable, self.network
        self.network.enable_adapters()
        try:
            yield
        finally:
            self.network.disable_adapters()
            self.pipeline.trainable = called


def fake_network(pipeline: Any, trained: Mapping[str, nn.Parameter], teacher: str | None, base: Base) -> FakeNetwork:
    """Load the teacher's network, if it is another model's, into the place of the reference; add the fake score.

    Raises UserError for a model that is no flow, and for a teacher that does not fit.
    """
    from diffalign.lora_tensors import START, adapter_names, is_start
    from diffalign.schedules import RectifiedFlow
    from diffalign.types import UserError

    if not isinstance(pipeline.schedule, RectifiedFlow):
        raise UserError("distribution matching is derived for flow models here; take one such as SD3.5 or FLUX")
    if teacher is not None:
        pipeline.frozen = teacher_network(teacher, pipeline)
    if base == "generator":
        return Exchanged(trained, {})
    layers = adapter_names(pipeline.network)
    if layers and teacher is not None:
        return OnTeacher(pipeline)
    if START in layers:
        kept = [p for name, p in pipeline.network.named_parameters() if is_start(name) and ".lora_B." in name]
        return Exchanged(trained, {}, kept)
    if teacher is None:
        raise UserError("algorithm.fake.base: teacher has no effect where training starts from the teacher; remove it")
    return Exchanged(trained, dict(pipeline.frozen.named_parameters()))


def teacher_network(path: str, pipeline: Any) -> nn.Module:
    """The denoising network of another model, frozen, in the dtype and on the device of the pipeline's.

    Raises UserError for one that reads other latents or other embeddings of the prompts.
    """
    from diffalign import pipelines
    from diffalign.types import UserError

    dtype = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}[str(pipeline.dtype)]
    other = pipelines.load(path, None, dtype, str(pipeline.device), pipeline.max_sequence_length, "offload")
    network: nn.Module = other.network
    ours, theirs = ({key: n.config.get(key) for key in INPUTS} for n in (pipeline.network, other.network))
    if ours != theirs:
        raise UserError(f"teacher '{path}' reads {theirs}, and the generator {ours}; take a teacher of its family")
    read = [p.encode(["a red circle"]).rows() for p in (pipeline, other)]  # equal sizes do not make equal encoders
    gaps = [float((a - read[1][name].to(a)).abs().max() / a.abs().max()) for name, a in read[0].items()]
    if max(gaps) > ROUNDED:
        raise UserError(f"teacher '{path}' has other text encoders than the generator; take a teacher of its family")
    return network

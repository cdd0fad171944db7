"""How several rewards share one gradient: one file a method, found by name; without any, `advantage` combines them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffalign.methods import Method

if TYPE_CHECKING:
    from torch import Tensor


class MultiReward(Method):
    """Base of every method. Each reward has advantages of its own, and a gradient g_k wherever losses are split.

    Methods see the Gram matrix G_jk = g_j . g_k of the raw gradients alone, and answer with coefficients.
    """

    @property
    def mixes(self) -> bool:
        """Trains on mixtures of advantages too, so that the loss must be affine in them."""
        return False

    @property
    def splits(self) -> bool:
        """Ever splits losses by reward, which takes the memory of a gradient for each."""
        return True

    @property
    def split_losses(self) -> int | None:
        """How many losses of a micro-batch a step splits that does not split all; None: it splits all or none."""
        return None

    def grouped(self, names: list[str]) -> dict[str, list[str]]:
        """What counts as one reward: name -> rewards whose advantages are averaged. UserError for unknown ones."""
        return {name: [name] for name in names}

    def start(self, rewards: int, seed: int) -> dict[str, Tensor]:
        """What the method carries from step to step, to be changed in place; checkpoints keep it. What it draws follows
        from the run's seed."""
        return {}

    @abstractmethod
    def lead(self, state: Mapping[str, Tensor]) -> int | None:
        """How many losses of every micro-batch this step splits by reward, from the first on; None = all."""

    @abstractmethod
    def coefficients(self, gram: Tensor, importance: Tensor, state: dict[str, Tensor]) -> Tensor:
        """c [K] float64: the split losses have the gradient sum_k c_k g_k.

        Args:
            gram: [K, K] float64, finite.
            importance: [K] float64, the weights of the rewards.
            state: to be changed in place.
        """

    @abstractmethod
    def mixture(self, importance: Tensor, applies: Tensor, state: dict[str, Tensor]) -> Tensor:
        """[K] float64: the losses that are not split are taken at advantages sum_k m_k A_k. Called once a step, last.

        `applies` [K] float64 is the share of the step's images that each reward applies to.
        """

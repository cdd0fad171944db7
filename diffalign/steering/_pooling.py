"""Several independent particle systems as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from diffalign.steering import Lineage, Outcome


def pooled(outcomes: Sequence[Outcome]) -> Outcome:
    """Systems of one target joined: system m's weights count Z_m times, and Z is their mean.

    That keeps Z unbiased and the joined weights proper (island particle models, arXiv 1306.3911). Systems without a Z
    count alike.
    """
    if len(outcomes) == 1:
        return outcomes[0]
    evidence = torch.tensor([0.0 if o.log_z is None else o.log_z for o in outcomes], dtype=torch.float64)
    log_w = torch.cat([o.log_weights + z for o, z in zip(outcomes, evidence, strict=True)])
    lineage, leaves = Lineage(), []
    for o in outcomes:
        shift = len(lineage.step)
        lineage.step += o.lineage.step
        lineage.parent += [None if p is None else p + shift for p in o.lineage.parent]
        lineage.reward += o.lineage.reward
        leaves += [leaf + shift for leaf in o.leaves]
    known, ranked = outcomes[0].log_z is not None, outcomes[0].standing is not None
    return Outcome(
        x=torch.cat([o.x for o in outcomes]),
        rewards=torch.cat([o.rewards for o in outcomes]),
        log_weights=log_w.log_softmax(0),
        leaves=leaves,
        lineage=lineage,
        log_z=float(evidence.logsumexp(0)) - math.log(len(outcomes)) if known else None,
        standing=torch.cat([o.standing for o in outcomes if o.standing is not None]) if ranked else None,
        history=[{**row, "round": m} for m, o in enumerate(outcomes) for row in o.history],
    )

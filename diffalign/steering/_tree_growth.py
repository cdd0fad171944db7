"""Growing a tree: visits are chosen in batches, their rollouts denoised together, until a limit is reached."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.steering import Lineage, Outcome, _tree_file
from diffalign.steering._problem import Problem
from diffalign.steering._tree import DEFAULT_VISITS, Rules, Tree, backup, descend
from diffalign.types import UserError

SAVE_EVERY = 60.0  # seconds
SETTLED = 4  # visits a forward, after which a tree only returns to what it has

# normalised log weight of each leaf, and log Z
Weigh = Callable[[Tree], tuple[Mapping[int, float], float | None]]


@dataclass(frozen=True)
class Limits:
    """When growing ends: after a whole batch, so that a tree which is gone on with equals one that never stopped."""

    visits: int | None
    nfe: int | None
    seconds: float | None

    def reached(self, problem: Problem, tree: Tree, batch: int, done: int, took: float) -> bool:
        """Whether the tree is full, or one more batch might not fit; `done` of them took `took` seconds in this run."""
        spent, visits = problem.spent, tree.nodes[0].visits
        if self.visits is not None and visits >= self.visits:
            return True
        if self.nfe is not None:
            # visits to old leaves are free, so forwards alone might never run out
            settled = visits * problem.oracle.cost >= SETTLED * self.nfe
            if settled or spent.nfe + batch * _longest(problem) > self.nfe:
                return True
        return self.seconds is not None and done > 0 and spent.elapsed + took / done > self.seconds


def limits(visits: int | None, nfe: int | None, seconds: float | None) -> Limits:
    """Without a number of visits the budgets alone decide; without any of them, DEFAULT_VISITS."""
    return Limits(DEFAULT_VISITS if visits is None and nfe is None and seconds is None else visits, nfe, seconds)


@dataclass(frozen=True)
class Rollout:
    """A new child on its way to the end."""

    source: int  # the node that gets it
    nodes: list[int]  # what it adds: a node at each branch step that it passes, and the leaf
    generator: torch.Generator


def _longest(problem: Problem) -> int:
    return problem.steps * problem.oracle.cost


def search(problem: Problem, rules: Rules, end: Limits, name: str, folder: str | None, weigh: Weigh) -> Outcome:
    """All leaves of a tree that has reached `end`, a new one or that of a file in `folder`, where it is saved.

    Whatever ends it before, such as Ctrl-C or an error of the reward, leaves the whole batches in the file.
    """
    if folder is not None and problem.own is not None:
        raise UserError(
            "a tree that is saved needs one seed, from which all noise follows; give that, or no folder of trees"
        )
    path = None if folder is None else Path(folder) / f"tree-{problem.prompt:04d}.safetensors"
    like = problem.start([problem.generator(0)])  # for its shape, device and dtype
    settings = {**_circumstances(problem, like), "method": name, **asdict(rules)}
    tree = Tree(problem.generator(0))
    if path is not None and (found := _tree_file.opened(path, settings)) is not None:
        tree, settings["lam"] = found
        rules = replace(rules, lam=settings["lam"])
    least = rules.batch * _longest(problem)
    if end.nfe is not None and not tree.leaves and problem.spent.nfe + least > end.nfe:
        after = f" after the {problem.spent.nfe} already spent" if problem.spent.nfe else ""
        raise UserError(
            f"budget_nfe {end.nfe} is less than one batch of '{name}', {least} network forwards{after}; raise it, or "
            "lower batch or the number of steps"
        )
    problem.spent.nfe += tree.nfe  # a budget is for all runs of a prompt together
    done, began = 0, time.monotonic()
    saved, whole = began, tree.mark()
    try:
        while not end.reached(problem, tree, rules.batch, done, time.monotonic() - began):
            _batch(problem, tree, rules, like)
            whole = tree.mark()
            done += 1
            if path is not None and time.monotonic() - saved > SAVE_EVERY:
                _tree_file.save(tree, settings, path)
                saved = time.monotonic()
    finally:
        if path is not None and done:
            tree.rewind(whole)  # half a batch could not be gone on with
            _tree_file.save(tree, settings, path)
    return _outcome(tree, like.device, weigh)


def _circumstances(problem: Problem, like: Tensor) -> dict[str, Any]:
    """What the tree depends on beside its rules, as far as it can be told; first what the user knows best."""
    return {
        "about": dict(problem.about),
        "shape": list(like.shape[1:]),
        "seed": problem.seed,
        "prompt": problem.prompt,
        "sigmas": problem.oracle.sigmas.tolist(),
        "kernel": problem.kernel,
        "eta": problem.eta,
        "stochastic": sorted(problem.stochastic),
    }


def _batch(problem: Problem, tree: Tree, rules: Rules, like: Tensor) -> None:
    before, found = problem.spent.nfe, max(tree.rewards(), default=-math.inf)
    paths, rollouts = [], []
    for _ in range(rules.batch):
        path = descend(tree, rules)
        if tree.nodes[path[-1]].reward is None:
            rollouts.append(sprout(problem, tree, rules, path[-1]))
            path += rollouts[-1].nodes
        for n in path:
            tree.nodes[n].visits += 1
        paths.append(path)
    if rollouts:
        rollouts.sort(key=lambda r: tree.nodes[r.source].step)
        x = denoised(problem, tree, rules, rollouts, like)
        rewards: list[float] = problem.score(x, problem.steps, some=False).tolist()
        for rollout, latent, reward in zip(rollouts, x, rewards, strict=True):
            leaf = rollout.nodes[-1]
            tree.leaves[leaf] = latent.to("cpu", copy=True)
            tree.nodes[leaf].reward = reward
            tree.nodes[leaf].psi = rules.lam * reward if reward > -math.inf else reward
    for path in paths:
        backup(tree, path)
    tree.nfe += problem.spent.nfe - before
    best = max(tree.rewards())
    if best > found:
        tree.history.append({"visits": tree.nodes[0].visits, "leaves": len(tree.leaves), "nfe": tree.nfe, "best": best})


def sprout(problem: Problem, tree: Tree, rules: Rules, source: int) -> Rollout:
    """Number a new child and all that follows it. Its noise is a function of (seed, prompt, source, which child)."""
    which = len(tree.nodes[source].children)
    generator = problem.generator(source, which) if source else problem.particles(which, 1)[0]
    nodes: list[int] = []
    for i in [*(b for b in rules.branch if b > tree.nodes[source].step), problem.steps]:
        nodes.append(tree.add(i, nodes[-1] if nodes else source))
    return Rollout(source, nodes, generator)


def denoised(problem: Problem, tree: Tree, rules: Rules, rollouts: Sequence[Rollout], like: Tensor) -> Tensor:
    """x_T [n, ...] of new children, those at the same step in one model call; fills `tree.states`.

    Rollouts come sorted by the step of their source. `like` gives device and dtype.
    """
    x, going = like[:0], 0  # the first `going` rollouts have left their sources

    def kept(t: Tensor) -> Tensor:
        return t.to("cpu", torch.bfloat16 if rules.store == "bf16" else t.dtype, copy=True)

    for i in range(problem.steps):
        if i == 0 and (new := [r.generator for r in rollouts if r.source == 0]):
            x, going = problem.start(new), len(new)
        x0, eps = problem.predict(x, i) if going else (x, x)
        if i in rules.branch:
            for j, rollout in enumerate(rollouts[:going]):
                node = next(n for n in rollout.nodes if tree.nodes[n].step == i)
                tree.states[node] = kept(x[j]), kept(x0[j]), kept(eps[j])
        if joining := [tree.states[r.source] for r in rollouts[going:] if tree.nodes[r.source].step == i]:
            stored = [torch.stack(part).to(like) for part in zip(*joining, strict=True)]
            x, x0, eps = (torch.cat(pair) for pair in zip((x, x0, eps), stored, strict=True))
            going += len(joining)
        if going:
            x = problem.seen(i, problem.advance(x, x0, eps, i, [r.generator for r in rollouts[:going]]).next, x0)
    return x


def _outcome(tree: Tree, device: torch.device, weigh: Weigh) -> Outcome:
    rewards = {n: r for n in tree.leaves if (r := tree.nodes[n].reward) is not None}
    if max(rewards.values()) == -math.inf:
        raise UserError(
            f"the reward is NaN for all {len(rewards)} images of the tree; check that it applies to this prompt"
        )
    log_w, log_z = weigh(tree)
    lineage = Lineage()
    for node in tree.nodes[1:]:  # the root is no state
        lineage.add(node.step, node.parent - 1 if node.parent else None, node.reward)
    return Outcome(
        x=torch.stack([tree.leaves[n] for n in rewards]).to(device),
        rewards=torch.tensor(list(rewards.values()), dtype=torch.float64),
        log_weights=torch.tensor([log_w[n] for n in rewards], dtype=torch.float64),
        leaves=[n - 1 for n in rewards],
        lineage=lineage,
        log_z=log_z,
        history=tree.history,
    )

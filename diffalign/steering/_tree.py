"""The tree behind `dts` and `dts_star` (Diffusion Tree Sampling and Search, arXiv 2506.20701).

A node is a state x_i, its children are draws from the sampler's own p(. | x_i), and a leaf is a finished latent. With
psi(leaf) = lam r and psi(node) = log mean_c exp(psi(c)), psi / lam is the soft value (1 / lam) log E[exp(lam r) | x_i].
A visit walks down from the root, which stands for the draw of the noise; a node with fewer than C N^a children after N
visits gets another, which is denoised to the end, and psi is renewed on the way back up.

Only states at `branch` steps are kept, since no other has a second child: three latents each (x, x0 and eps, so that
this child costs no model call at the node) and one a leaf. M visits hold at most M (3 len(branch) + 1) latents on the
CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from diffalign.steering import HIGHEST, POINTS, scheduled
from diffalign.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT_VISITS = 64
LOWEST = 0.1  # below this noise level children are nearly the same image


@dataclass(frozen=True)
class Rules:
    """How a tree grows; two trees of the same rules, seed and model are the same tree.

    Attributes:
        width, alpha, root_alpha: C and a of the widening; the root has its own a.
        branch: steps whose states may have several children.
        batch: visits that are chosen before their rollouts are done; each counts at once in the N of its path.
        c_uct: None: children are drawn in proportion to exp(psi); else argmax psi / lam + c_uct sqrt(log N / N_c).
        min_visits: a child is drawn by its psi only after that many visits.
        store: dtype of the kept states; leaves are always exact.
    """

    lam: float
    width: float
    alpha: float
    root_alpha: float
    branch: tuple[int, ...]
    batch: int
    c_uct: float | Literal["auto"] | None = None
    min_visits: int = 1
    store: Literal["exact", "bf16"] = "exact"


@dataclass
class Node:
    step: int  # -1: the root
    parent: int | None
    visits: int = 0
    psi: float | None = None  # None while the rollout that made it is under way
    reward: float | None = None  # of a leaf, -inf for NaN
    children: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """A tree between two batches: what the next one changes of it."""

    visits: list[int]  # of all nodes, as psi
    psi: list[float | None]
    control: Tensor
    nfe: int
    improvements: int


@dataclass
class Tree:
    """Nodes by number, parents before children; node 0 is the root."""

    control: torch.Generator  # draws the way down
    nodes: list[Node] = field(default_factory=lambda: [Node(-1, None)])
    states: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)  # x, x0, eps [...] of inner nodes
    leaves: dict[int, Tensor] = field(default_factory=dict)  # x_T [...]
    nfe: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def root(self) -> Node:
        return self.nodes[0]

    def add(self, step: int, parent: int) -> int:
        self.nodes.append(Node(step, parent))
        self.nodes[parent].children.append(len(self.nodes) - 1)
        return len(self.nodes) - 1

    def uniform(self) -> float:
        import torch

        return float(torch.rand((), generator=self.control, dtype=torch.float64))

    def mark(self) -> Mark:
        visits, psi = [n.visits for n in self.nodes], [n.psi for n in self.nodes]
        return Mark(visits, psi, self.control.get_state(), self.nfe, len(self.history))

    def rewind(self, mark: Mark) -> None:
        """Be again what it was, whatever a batch that did not end has done since."""
        size = len(mark.visits)
        del self.nodes[size:], self.history[mark.improvements :]
        for node, visits, psi in zip(self.nodes, mark.visits, mark.psi, strict=True):
            node.visits, node.psi = visits, psi
            node.children = [c for c in node.children if c < size]
        self.states = {n: state for n, state in self.states.items() if n < size}
        self.leaves = {n: leaf for n, leaf in self.leaves.items() if n < size}
        self.control.set_state(mark.control)
        self.nfe = mark.nfe

    def rewards(self) -> list[float]:
        return [r for n in self.leaves if (r := self.nodes[n].reward) is not None]


def log_mean_exp(psi: Sequence[float]) -> float:
    """psi of a node from its children's."""
    top = max(psi)
    return top if top == -math.inf else top + math.log(sum(math.exp(p - top) for p in psi) / len(psi))


def log_share(psi: float, parent: float, siblings: int) -> float:
    """Log probability of a child in the Boltzmann descent, exp(psi) / sum_c exp(psi(c))."""
    return psi - parent - math.log(siblings) if psi > -math.inf else psi


def most_forwards(rollouts: int | None, batch: int, budget: int | None, each: int) -> int:
    """Network forwards of whole batches of rollouts that cost `each`, or of the budget."""
    most = math.ceil((rollouts or DEFAULT_VISITS) / batch) * batch * each
    if budget is None:
        return most
    return budget if rollouts is None else min(most, budget)


def branching(
    wanted: Sequence[int] | Literal["auto", "all"], sigmas: Sequence[float], noisy: Sequence[int], name: str
) -> tuple[int, ...]:
    """Steps at which a state may have several children: those given, all with noise, or five spread over these.

    Raises UserError where no transition has noise, or that of a given step has none.
    """
    if not noisy:
        scheduled("all", sigmas, noisy, name)  # says so
    if wanted == "all":
        return tuple(noisy)
    if wanted == "auto":
        usable = [i for i in noisy if LOWEST <= sigmas[i] <= HIGHEST] or list(noisy)
        n = min(POINTS, len(usable))
        return tuple(usable[int((k + 0.5) * len(usable) / n)] for k in range(n))
    outside = [i for i in wanted if i not in noisy]
    if outside:
        raise UserError(
            f"cannot branch at step {outside[0]}, whose transition has no noise; give steps among "
            f"{', '.join(map(str, noisy))}"
        )
    return tuple(sorted(set(wanted)))


def descend(tree: Tree, rules: Rules) -> list[int]:
    """Nodes from the root to a leaf, or to the node that gets a child."""
    spread = _spread(tree.rewards()) if rules.c_uct == "auto" else rules.c_uct
    path = [0]
    while (node := tree.nodes[path[-1]]).reward is None:
        known = [c for c in node.children if tree.nodes[c].psi is not None]
        young = [c for c in known if tree.nodes[c].visits < rules.min_visits and tree.nodes[c].reward is None]
        possible = [c for c in known if tree.nodes[c].psi != -math.inf]
        wide = rules.width * max(1, node.visits) ** (rules.alpha if path[1:] else rules.root_alpha)
        if len(node.children) < wide or not (young or possible):
            return path
        if young:
            path.append(min(young, key=lambda c: tree.nodes[c].visits))
        elif spread is None:
            path.append(_drawn(tree, possible))
        else:
            path.append(_best(tree, possible, rules.lam, spread * math.sqrt(math.log(node.visits))))
    return path


def _spread(rewards: Sequence[float]) -> float:
    known = [r for r in rewards if r > -math.inf]
    mean = sum(known) / max(1, len(known))
    return math.sqrt(sum((r - mean) ** 2 for r in known) / max(1, len(known)))


def _drawn(tree: Tree, children: Sequence[int]) -> int:
    if len(children) == 1:
        return children[0]
    psi = [p for c in children if (p := tree.nodes[c].psi) is not None]
    top = max(psi)
    weights = [math.exp(p - top) for p in psi]
    left = tree.uniform() * sum(weights)
    for child, weight in zip(children, weights, strict=True):
        left -= weight
        if left < 0:
            return child
    return children[-1]


def _best(tree: Tree, children: Sequence[int], lam: float, bonus: float) -> int:
    def value(c: int) -> float:
        node = tree.nodes[c]
        assert node.psi is not None
        return node.psi / lam + bonus / math.sqrt(node.visits)

    return max(children, key=value)


def backup(tree: Tree, path: Sequence[int]) -> None:
    """Renew psi of the nodes of a path, whose last one has it, from below."""
    for n in reversed(path[:-1]):
        tree.nodes[n].psi = log_mean_exp([p for c in tree.nodes[n].children if (p := tree.nodes[c].psi) is not None])


def greedy(tree: Tree) -> dict[int, float]:
    """Leaf -> log weight: all on the one that the child of highest psi at every node leads to."""
    at = 0
    while children := tree.nodes[at].children:
        at = max(children, key=lambda c: p if (p := tree.nodes[c].psi) is not None else -math.inf)
    return {leaf: 0.0 if leaf == at else -math.inf for leaf in tree.leaves}


def log_probabilities(tree: Tree) -> dict[int, float]:
    """Leaf -> exact log probability that the Boltzmann descent ends there."""
    log_p = [0.0] * len(tree.nodes)
    for n, node in enumerate(tree.nodes):
        for c in node.children:
            psi, parent = tree.nodes[c].psi, node.psi
            assert psi is not None and parent is not None
            log_p[c] = log_p[n] + log_share(psi, parent, len(node.children))
    return {leaf: log_p[leaf] for leaf in tree.leaves}

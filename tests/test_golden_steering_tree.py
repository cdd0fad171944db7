"""The soft backup of a tree and its Boltzmann descent against golden vectors (float64)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_data import close, load

from diffalign.steering._tree import Tree, backup, log_probabilities, log_share


def grown(spec: dict[str, Any], lam: float) -> tuple[Tree, dict[int, dict[str, Any]]]:
    """The tree, its values backed up from the leaves, and what is expected of each node."""
    tree, expected = Tree(torch.Generator()), {}

    def fill(n: int, node: dict[str, Any], path: list[int]) -> None:
        expected[n] = node
        for child in node.get("ch", []):
            fill(c := tree.add(len(path), n), child, [*path, c])
        if "ch" not in node:
            tree.nodes[n].reward, tree.nodes[n].psi = node["r"], lam * node["r"]
            tree.leaves[n] = torch.zeros(1)
            backup(tree, path)

    fill(0, spec, [0])
    return tree, expected


@pytest.mark.parametrize("case", load("steering", "spec_fk_dts")["trees"])
def test_backup(case: dict[str, Any]) -> None:
    assert set(case) == {"lambda_", "tree"}
    lam = case["lambda_"]
    tree, expected = grown(case["tree"], lam)
    below = {0: 1.0}  # probability that the descent comes by
    for n, node in expected.items():
        psi = tree.nodes[n].psi
        assert psi is not None
        close(psi / lam, node["v"])
        if "ch" not in node:
            assert set(node) == {"r", "v"} and tree.nodes[n].reward == node["r"]
            continue
        assert set(node) == {"ch", "v", "select_p"}
        children = tree.nodes[n].children
        shares = [math.exp(log_share(p, psi, len(children))) for c in children if (p := tree.nodes[c].psi) is not None]
        close(shares, node["select_p"])
        below |= {c: below[n] * p for c, p in zip(children, node["select_p"], strict=True)}
    found = log_probabilities(tree)
    close([math.exp(p) for p in found.values()], [below[leaf] for leaf in found])
    assert sum(map(math.exp, found.values())) == pytest.approx(1)

"""The min-norm programme against an enumeration of all supports, its optimality conditions, and degenerate gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from diffalign.multireward._min_norm import SolveError, balance, min_norm


def gradients(count: int, seed: int, orders: float = 0.0, size: int = 12) -> Tensor:
    """[count, size] random directions, their lengths spread over so many orders of magnitude around 1."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.nn.functional.normalize(torch.randn(count, size, generator=generator, dtype=torch.float64), dim=1)
    spread = torch.linspace(-orders / 2, orders / 2, count, dtype=torch.float64) if count > 1 else torch.zeros(1)
    return g * 10 ** spread[torch.randperm(count, generator=generator), None]


def enumerated(gram: Tensor, floor: float) -> Tensor:
    """The best of the 2^K - 1 points that are stationary where a support is free and the other shares are the floor."""
    count, norms = len(gram), gram.diagonal().sqrt()
    cosines = gram / norms.outer(norms)
    best, least = gram, math.inf
    for chosen in itertools.product((True, False), repeat=count):
        free = torch.tensor(chosen)
        size = int(free.sum())
        if not size:
            continue
        unit = norms[free].min()
        ratios = unit / norms[free]
        system = torch.zeros(size + 1, size + 1, dtype=gram.dtype)
        system[:size, :size], system[:size, size], system[size, :size] = cosines[free][:, free], -ratios, ratios
        pull = cosines[free][:, ~free] @ norms[~free] * floor / unit
        left = torch.tensor([1 - floor * (count - size)], dtype=gram.dtype)
        alphas = torch.full((count,), floor, dtype=gram.dtype)
        alphas[free] = ratios * torch.linalg.solve(system, torch.cat([-pull, left]))[:size]
        value = float(alphas @ gram @ alphas)
        if bool((alphas >= floor * (1 - 1e-12)).all()) and value < least:
            best, least = alphas, value
    return best


@pytest.mark.parametrize("share", [0.0, 0.4], ids=["free", "floor"])
@pytest.mark.parametrize("orders", [0, 3, 12])
@pytest.mark.parametrize("count", range(1, 9))
def test_exact(count: int, orders: int, share: float) -> None:
    floor = share / count
    for seed in range(2):
        g = gradients(count, seed, orders)
        alphas, expected = min_norm(g @ g.T, floor), enumerated(g @ g.T, floor)
        assert float(alphas.sum()) == pytest.approx(1, abs=1e-12)
        assert float(alphas.min()) >= floor - 1e-12
        length = float((expected @ g).norm())
        assert float((alphas @ g).norm()) <= length * (1 + 1e-9)
        if orders < 12 or not floor:  # there, shares of gradients that are 1e-12 of the longest cannot be told apart
            assert float((alphas - expected).abs().max()) < 1e-6
            assert float(((alphas - expected) @ g).norm()) < 1e-6 * length


@pytest.mark.parametrize("size", [2, 3, 12])  # with 2 and 3, most sets are linearly dependent and some surround 0
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", range(2, 9))
def test_no_gradient_is_worse_aligned_than_those_that_count(count: int, normalize: bool, size: int) -> None:
    for seed in range(2):
        g = gradients(count, seed, orders=2, size=size)
        found = balance(g @ g.T, normalize)
        assert found.fallback == "none"
        solved = g / g.norm(dim=1, keepdim=True) if normalize else g
        d = found.alphas @ solved
        assert found.direction_norm == pytest.approx(float(d.norm()), abs=1e-7)
        torch.testing.assert_close(found.inner, solved @ d, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(found.coefficients @ g, found.scale * d, atol=1e-10, rtol=1e-10)
        slack = (solved @ d - d @ d) / solved.norm(dim=1)
        assert float(slack.min()) > -1e-8
        assert float(slack[found.alphas > 1e-4].max()) < 1e-8


def test_two_normalised_gradients_always_share_equally() -> None:
    for seed in range(5):
        g = gradients(2, seed, orders=6)
        found = balance(g @ g.T)
        torch.testing.assert_close(found.alphas, torch.full((2,), 0.5, dtype=torch.float64), atol=1e-9, rtol=0)
        assert found.scale == pytest.approx(float(g.norm(dim=1).mean()))


@pytest.mark.parametrize("normalize", [True, False])
def test_opposed_gradients_cancel_out(normalize: bool) -> None:
    g = gradients(3, 0)
    for several in (torch.stack([g[0], -4 * g[0]]), torch.stack([g[0], g[1], -4 * g[0], g[2]])):
        found = balance(several @ several.T, normalize)
        assert found.fallback == "none"
        assert found.direction_norm < 1e-6
        assert float((found.coefficients @ several).norm()) < 1e-6
        opposed = found.alphas[several @ g[0] / several.norm(dim=1) / g[0].norm() > 1 - 1e-9]
        assert opposed.tolist() == pytest.approx([0.5 if normalize else 0.8], abs=1e-5)


def test_a_hull_around_zero() -> None:
    angles = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    g = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1e-3], [1.0], [1e3]])
    found = balance(g @ g.T)
    torch.testing.assert_close(found.alphas, torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.direction_norm < 1e-6


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_duplicates_change_nothing(count: int, copies: int) -> None:
    for seed in range(3):
        g = gradients(count, seed, orders=1)
        more = torch.cat([g, g[:1].expand(copies, -1) * torch.tensor([[2.0]])])
        once, again = min_norm(balance(g @ g.T).gram), balance(more @ more.T)
        assert again.fallback == "none"
        unit = more / more.norm(dim=1, keepdim=True)
        torch.testing.assert_close(again.alphas @ unit, once @ unit[:count], atol=1e-7, rtol=0)


def test_rounding_that_makes_a_gram_indefinite() -> None:
    gram = torch.ones(4, 4, dtype=torch.float64) + 1e-9 * (1 - torch.eye(4, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(gram).min()) < 0
    found = balance(gram)
    assert found.fallback == "none"
    assert found.direction_norm == pytest.approx(1, abs=1e-6)
    single = gradients(6, 0, orders=4, size=3).float()  # inner products as the trainer may have them
    found = balance(single @ single.T)
    assert found.fallback == "none"
    assert float(found.alphas.sum()) == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, 1e-13])
def test_invalid_gradients_take_no_part(bad: float) -> None:
    g = gradients(4, 1, orders=1)
    spoilt = torch.cat([g[:1], g[1:2] * bad, g[1:]])
    scales = torch.tensor([1.0, 9.0, 0.5, 2.0, 1.0])
    valid = torch.tensor([True, False, True, True, True])
    found, clean = balance(spoilt @ spoilt.T, True, scales, 0.05), balance(g @ g.T, True, scales[valid], 0.05)
    assert found.valid.equal(valid)
    assert found.fallback == "none"
    assert found.scale == pytest.approx(clean.scale)
    for whole, part in ((found.alphas, clean.alphas), (found.coefficients, clean.coefficients)):
        torch.testing.assert_close(whole[valid], part)
        assert float(whole[1]) == 0
    torch.testing.assert_close(found.norms[valid], g.norm(dim=1))
    assert float(found.norms[1]) == pytest.approx(bad if bad < 1 else 0.0)


@pytest.mark.parametrize("normalize", [True, False])
def test_one_valid_gradient_is_taken_as_it_is(normalize: bool) -> None:
    g = gradients(3, 2) * torch.tensor([[0.0], [7.0], [math.nan]])
    found = balance(g @ g.T, normalize, torch.tensor([1.0, 5.0, 1.0]), floor=0.2)
    assert found.fallback == "single_valid"
    assert found.alphas.tolist() == found.coefficients.tolist() == [0, 1, 0]
    assert found.scale == pytest.approx(7)
    none = balance(g[:1] @ g[:1].T, normalize)
    assert none.fallback == "all_zero"
    assert none.coefficients.tolist() == none.alphas.tolist() == [0]
    assert none.scale == none.direction_norm == 0


def test_the_cosine_is_inversely_proportional_to_the_scale() -> None:
    for seed in range(4):
        g = gradients(4, seed, orders=2)
        scales = torch.tensor([0.5, 1.0, 1.5, 3.0], dtype=torch.float64)
        found = balance(g @ g.T, scales=scales)
        combined = found.coefficients @ g
        cosines = g @ combined / g.norm(dim=1) / combined.norm()
        expected = found.direction_norm / scales
        counts = found.alphas > 1e-4
        assert int(counts.sum()) > 1
        torch.testing.assert_close(cosines[counts], expected[counts], atol=1e-7, rtol=1e-7)
        assert bool((cosines >= expected - 1e-7).all())


def test_without_normalisation_the_coefficients_are_the_shares() -> None:
    g = gradients(4, 3, orders=2)
    found = balance(g @ g.T, normalize=False)
    assert found.coefficients.equal(found.alphas)
    assert found.scale == 1
    scales = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    scaled = balance(g @ g.T, False, scales)
    torch.testing.assert_close(scaled.alphas, min_norm((g * scales[:, None]) @ (g * scales[:, None]).T))
    torch.testing.assert_close(scaled.coefficients, scaled.alphas * scales)


@pytest.mark.parametrize("floor", [1 / 3, 0.5, 2.0])
def test_a_floor_that_leaves_no_choice(floor: float) -> None:
    g = gradients(3, 4, orders=2)
    torch.testing.assert_close(min_norm(g @ g.T, floor), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_a_gradient_of_zero_is_the_shortest_vector() -> None:
    g = gradients(3, 5) * torch.tensor([[1.0], [0.0], [1.0]])
    assert min_norm(g @ g.T).tolist() == [0, 1, 0]


def test_a_failed_solve_gives_equal_shares() -> None:
    gram = torch.eye(3, dtype=torch.float64) * torch.tensor([1.0, 4.0, 16.0])
    gram[0, 1] = gram[1, 0] = math.nan
    with pytest.raises(SolveError, match="not finite"):
        min_norm(gram)
    found = balance(gram)
    assert found.fallback == "solver_failed"
    assert found.alphas.tolist() == pytest.approx([1 / 3] * 3)
    assert found.coefficients.tolist() == pytest.approx([7 / 9, 7 / 18, 7 / 36])  # mean norm 7/3, over 3 |g_k|


def test_the_result_does_not_depend_on_what_was_solved_before() -> None:
    """To the last bit, or a resumed run would differ."""
    generator = torch.Generator().manual_seed(0)
    grams = [vectors @ vectors.T for vectors in torch.randn(8, 3, 5, generator=generator, dtype=torch.float64)]
    forwards = [min_norm(gram) for gram in grams]
    backwards = [min_norm(gram) for gram in reversed(grams)]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))

"""Trees that are saved and gone on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steering_trees import DEEP, METHODS, Toy, kept, problem, same, sde, states

from diffalign.steering.dts import DTS
from diffalign.steering.dts_star import DTSStar
from diffalign.types import UserError


@pytest.mark.parametrize("method", METHODS)
def test_a_tree_grows_from_its_smaller_self(method: Any) -> None:
    """Anytime: more rollouts add leaves, and those that were there stay."""
    small, large = (method(**DEEP, rollouts=m, batch=3).run(problem(5)) for m in (9, 30))
    assert torch.equal(large.x[: len(small.x)], small.x) and len(large.x) > len(small.x)
    again = method(**DEEP, rollouts=30, batch=3).run(problem(5))
    same(large, again)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("store", ["exact", "bf16"])
def test_resume_equals_one_run(method: Any, store: str, tmp_path: Path) -> None:
    options = {**DEEP, "batch": 3, "store": store}
    whole = problem(7, prompt=12)
    expected = method(**options, rollouts=30).run(whole)
    method(**options, rollouts=10, trees=str(tmp_path)).run(problem(7, prompt=12))
    assert [p.name for p in tmp_path.iterdir()] == ["tree-0012.safetensors"]
    resumed = problem(7, prompt=12)
    same(expected, method(**options, rollouts=30, trees=str(tmp_path)).run(resumed))
    assert resumed.spent.nfe == whole.spent.nfe
    assert resumed.oracle.states < states(whole)
    done = problem(7, prompt=12)
    same(expected, method(**options, rollouts=30, trees=str(tmp_path)).run(done))
    assert states(done) == 0


@pytest.mark.parametrize(
    "other, seed, message",
    [
        (DTS(lam=2.0, rollouts=4), 0, "another lam, 1.0, not 2.0"),
        (DTS(lam=1.0, rollouts=4), 1, "another seed, 0, not 1"),
        (DTS(lam=1.0, rollouts=4, branch_steps=(2,)), 0, "another branch;"),
        (DTSStar(lam=1.0, rollouts=4), 0, "another method, dts, not dts_star"),
    ],
)
def test_another_tree_is_refused(other: DTS | DTSStar, seed: int, message: str, tmp_path: Path) -> None:
    DTS(lam=1.0, rollouts=4, trees=str(tmp_path)).run(problem())
    with pytest.raises(UserError, match=message):
        other.model_copy(update={"trees": str(tmp_path)}).run(problem(seed))


def test_other_steps_and_noise_are_refused(tmp_path: Path) -> None:
    method = DTS(lam=1.0, rollouts=4, branch_steps=(2,), trees=str(tmp_path))
    method.run(sde())
    with pytest.raises(UserError, match="another sigmas;"):
        method.run(sde(oracle=Toy(12)))
    with pytest.raises(UserError, match=r"another eta, 1\.0, not 0\.5"):
        method.run(problem(move=None, kernel="flow_sde", eta=0.5, stochastic=range(1, 7)))


def test_damaged_and_impossible_files(tmp_path: Path) -> None:
    method = DTS(lam=1.0, rollouts=4, trees=str(tmp_path))
    method.run(problem())
    file = tmp_path / "tree-0000.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-8], whole[:300], b"", b"no tree at all"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot read tree file .* remove it"):
            method.run(problem())
    (tmp_path / "blocked").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write tree file"):
        DTS(lam=1.0, trees=str(tmp_path / "blocked")).run(problem())
    with pytest.raises(UserError, match="needs one seed"):
        method.run(problem(own=[torch.Generator()] * 4))


def test_bf16_takes_less_and_leaves_stay_exact(tmp_path: Path) -> None:
    found = {}
    for store in ("exact", "bf16"):
        found[store] = DTS(lam=1.0, rollouts=4, store=store, trees=str(tmp_path / store)).run(problem())  # type: ignore[arg-type]
    assert torch.equal(found["exact"].x, found["bf16"].x)  # no second children yet
    (exact, _), (short, _) = kept(tmp_path / "exact"), kept(tmp_path / "bf16")
    assert (exact["x0"].dtype, short["x0"].dtype, short["leaves"].dtype) == (
        torch.float64, torch.bfloat16, torch.float64,
    )  # fmt: skip

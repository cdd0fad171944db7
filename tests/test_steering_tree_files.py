"""Trees that are saved and gone on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from steering_trees import DEEP, METHODS, Toy, kept, problem, same, sde, states, tilt
from torch import Tensor

from diffalign.steering.dts import DTS
from diffalign.steering.dts_star import DTSStar
from diffalign.types import UserError

ABOUT: dict[str, Any] = {
    "metadata": {"prompt": "a red cube", "include": [{"count": 1}]},
    "rewards": [{"name": "jpeg", "weight": 1.0}],
    "model": "tiny",
    "arguments": {"guidance": 4.0, "height": 32},
}


class Cut:
    """The reward, but Ctrl-C comes at its n-th call, or at the model's."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, images: Tensor, sigma: float) -> Tensor:
        self.tick()
        return tilt(images)

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class CutToy(Toy):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.cut = Cut(calls)

    def predict(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        self.cut.tick()
        return super().predict(x, i)


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("where", ["reward", "model"])
def test_an_interrupted_tree_keeps_its_whole_batches(method: Any, batch: int, where: str, tmp_path: Path) -> None:
    cut: dict[str, Any] = {"judge": Cut(5)} if where == "reward" else {"oracle": CutToy(37)}

    def grown(folder: str, rollouts: int, **how: Any) -> bytes:
        asked = problem(7, **how)
        method(**DEEP, batch=batch, rollouts=rollouts, trees=str(tmp_path / folder)).run(asked)
        return (tmp_path / folder / "tree-0000.safetensors").read_bytes()

    with pytest.raises(KeyboardInterrupt):
        grown("cut", 30, **cut)
    visits = kept(tmp_path / "cut")[1]["nodes"]["visits"][0]
    assert visits > 0 and visits % batch == 0
    assert (tmp_path / "cut" / "tree-0000.safetensors").read_bytes() == grown("short", visits)
    assert grown("cut", 30) == grown("whole", 30)


def test_nothing_is_saved_of_a_first_batch_that_did_not_end(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        DTS(lam=1.0, rollouts=4, trees=str(tmp_path)).run(problem(judge=Cut(1)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_lam_of_a_pilot_on_another_machine(method: Any, tmp_path: Path) -> None:
    options = {**DEEP, "batch": 3, "trees": str(tmp_path)}
    method(**options, rollouts=9).run(problem())
    resumed = method(**{**options, "lam": 1.0 + 1e-9}, rollouts=30).run(problem())
    same(method(**{**options, "trees": None}, rollouts=30).run(problem()), resumed)
    assert kept(tmp_path)[1]["settings"]["lam"] == 1.0
    with pytest.raises(UserError, match=r"another lam, 1\.0, not 1\.00001;"):
        method(**{**options, "lam": 1.00001}, rollouts=30).run(problem())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metadata": {**ABOUT["metadata"], "prompt": "a cat"}}, "metadata.prompt, 'a red cube', not 'a cat'"),
        ({"metadata": {**ABOUT["metadata"], "prompt": "a cat " * 20}}, "metadata.prompt"),
        ({"metadata": {**ABOUT["metadata"], "tag": "new"}}, "metadata.tag, None, not 'new'"),
        ({"metadata": {"prompt": "a red cube"}}, "metadata.include"),
        ({"rewards": [{"name": "jpeg", "weight": 2.0}]}, "rewards"),
        ({"model": "other"}, "model, 'tiny', not 'other'"),
        ({"arguments": {"guidance": 5.0, "height": 32}}, "arguments.guidance, 4.0, not 5.0"),
    ],
)
def test_a_tree_about_something_else_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    method = DTS(lam=1.0, rollouts=4, trees=str(tmp_path))
    method.run(problem(about=ABOUT))
    file = tmp_path / "tree-0000.safetensors"
    before = file.read_bytes()
    with pytest.raises(UserError) as refused:
        # lam follows from the reward where it is auto, but is not what to speak of
        method.model_copy(update={"lam": 2.0}).run(problem(about={**ABOUT, **change}))
    assert str(refused.value) == (
        f"tree file '{file}' was grown with another {message}; give the same, name another folder or remove the file"
    )
    assert file.read_bytes() == before
    again = problem(about=ABOUT)
    method.run(again)
    assert states(again) == 0


def test_another_shape_is_refused(tmp_path: Path) -> None:
    class Larger(Toy):
        def start(self, generators: Sequence[torch.Generator]) -> Tensor:
            return super().start(generators)[:, None]

    method = DTS(lam=1.0, rollouts=4, trees=str(tmp_path))
    method.run(problem())
    with pytest.raises(UserError, match="another shape; .* name another folder or remove the file"):
        method.run(problem(oracle=Larger()))


@pytest.mark.parametrize(
    "other, seed, message",
    [
        (DTS(lam=2.0, rollouts=4), 0, "another lam, 1.0, not 2.0"),
        (DTS(lam=1.0, rollouts=4), 1, "another seed, 0, not 1"),
        (DTS(lam=1.0, rollouts=4, branch_steps=(2,)), 0, "another branch;"),
        (DTSStar(lam=1.0, rollouts=4), 0, "another method, 'dts', not 'dts_star'"),
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

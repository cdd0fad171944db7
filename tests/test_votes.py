"""Votes exported by the page: read, checked against the evaluation, and counted as wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import galleries
import numpy as np
import pytest

from diffalign.eval import votes
from diffalign.eval.gallery import read
from diffalign.types import UserError


def ballot(path: Path, cast: list[tuple[str, list[str], str | None]], **other: Any) -> Path:
    file = {
        "format": "diffalign votes", "version": 1, "evaluation": "e", "sitting": path.stem,
        "votes": [{"id": id, "shown": shown, "best": best} for id, shown, best in cast],
    }  # fmt: skip
    path.write_text(json.dumps(file | other))
    return path


def test_wins_of_two_and_of_several(tmp_path: Path) -> None:
    one = ballot(tmp_path / "one.json", [("0000", ["a", "b"], "a"), ("0001", ["b", "a"], None)])
    two = ballot(tmp_path / "two.json", [("0000", ["c", "a", "b"], "b")])
    cast = votes.read([one, two])
    assert [(v.id, v.sitting, v.evaluation) for v in cast] == [
        ("0000", "one", "e"), ("0001", "one", "e"), ("0000", "two", "e"),
    ]  # fmt: skip
    expected = [[0, 1.5, 0], [1.5, 0, 1], [0, 0, 0]]  # b over a and c; a and c were not compared then
    np.testing.assert_array_equal(votes.wins(cast, ["a", "b", "c"]), expected)
    assert votes.wins([], ["a", "b"]).shape == (2, 2)
    assert votes.tally(cast, ["a", "b", "c"]) == {"a": 1, "b": 1, "c": 0}


def test_order_of_names_is_that_asked_for(tmp_path: Path) -> None:
    cast = votes.read([ballot(tmp_path / "v.json", [("0000", ["a", "b"], "a")])])
    assert votes.wins(cast, ["b", "a"])[1, 0] == 1
    with pytest.raises(UserError, match="'b'"):
        votes.wins(cast, ["a"])


@pytest.mark.parametrize(
    ("cast", "other"),
    [
        ([("0000", ["a", "b"], "c")], {}),  # not shown
        ([("0000", ["a", "a"], "a")], {}),
        ([("0000", ["a"], "a")], {}),
        ([], {"format": "something else"}),
        ([], {"version": 2}),
        ([("0000", ["a", "b"], "a"), ("0000", ["a", "b"], "b")], {}),  # twice on a prompt
    ],
)
def test_what_is_no_export_is_refused(tmp_path: Path, cast: list[Any], other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"v\.json"):
        votes.read([ballot(tmp_path / "v.json", cast, **other)])


def test_missing_and_half_written_files_are_refused(tmp_path: Path) -> None:
    path = ballot(tmp_path / "v.json", [("0000", ["a", "b"], "a")])
    path.write_text(path.read_text()[:-5])
    for file in (path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="exported by a report page"):
            votes.read([file])


def test_a_sitting_counts_once(tmp_path: Path) -> None:
    early = ballot(tmp_path / "early.json", [("0000", ["a", "b"], "a")], sitting="s")
    late = ballot(tmp_path / "late.json", [("0000", ["a", "b"], "a"), ("0001", ["a", "b"], "b")], sitting="s")
    with pytest.raises(UserError, match="one sitting"):
        votes.read([early, late])
    assert len(votes.read([late])) == 2


def test_votes_belong_to_an_evaluation(tmp_path: Path) -> None:
    own = read(galleries.write(tmp_path / "own", models=["base", "tuned"], prompts=2, images=1))
    more = read(galleries.write(tmp_path / "more", models=["base", "tuned", "later"], prompts=2, images=1))
    other = read(galleries.write(tmp_path / "other", prompts=3, images=1))
    assert votes.fingerprint(own) == votes.fingerprint(more) != votes.fingerprint(other)
    path = ballot(tmp_path / "v.json", [("0001", ["base", "tuned"], "base")], evaluation=votes.fingerprint(own))
    cast = votes.read([path])
    votes.check(cast, own)
    votes.check(cast, more)
    with pytest.raises(UserError, match="another evaluation"):
        votes.check(cast, other)
    unknown = ballot(tmp_path / "u.json", [("0001", ["base", "gone"], "base")], evaluation=votes.fingerprint(own))
    with pytest.raises(UserError, match="'gone'"):
        votes.check(votes.read([unknown]), own)

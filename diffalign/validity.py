"""Images that a reward should have scored and could not, such as those that a silent server was asked about."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate.utils import gather_object

from diffalign.types import RewardOutput, Stopped

INVALID = 0.2  # share of the images above which a reward that cannot score them stops the run


def reasons(output: RewardOutput) -> list[str | None]:
    """Why each image has no valid score; None for the others."""
    assert output.valid is not None
    said = output.extra.get("error") or [None] * len(output.valid)
    return [None if ok else (why or "it gave no reason") for ok, why in zip(output.valid.tolist(), said, strict=True)]


def invalid(outputs: Mapping[str, RewardOutput], images: str) -> dict[str, float]:
    """'invalid/NAME': share of the images that a reward could not score, of those it applies to, over all processes.

    Raises Stopped on every process where it is above `INVALID`; the sentence speaks of `images`.
    """
    mine = {}
    for name, output in outputs.items():
        why = [reason for reason in reasons(output) if reason is not None]
        mine[name] = (len(why), int((~output.scores.isnan()).sum()), why[:1])
    logged = {}
    every = gather_object([mine])
    for name in outputs:
        failed, scored = (sum(part[name][k] for part in every) for k in (0, 1))
        if failed:
            logged[f"invalid/{name}"] = failed / (failed + scored)
        if failed > INVALID * (failed + scored):
            why = next(reason for part in every for reason in part[name][2])
            raise Stopped(
                f"reward '{name}' could not score {failed} of the {failed + scored} images of {images}, more than "
                f"{INVALID:.0%}: {why}; the last checkpoint stays"
            )
    return logged

"""Eight warning signs of reward hacking, each from what an evaluation folder holds.

A sign is green, amber or red when the data tell, and unknown, with the reason, when they do not. Two things must hold
before one is raised: the difference from the baseline is larger than a limit, which stands with its reason at the head
of the sign's file, and it is beyond chance among prompts (t-test; one false alarm a sign in a thousand evaluations).
"""

from __future__ import annotations

from collections.abc import Callable

from diffalign.eval._sign import Level, Sign
from diffalign.eval._sign_pictures import diversity, duplicates, look
from diffalign.eval._sign_scores import fragile, prompt_blind, traded, unasked_text
from diffalign.eval._sign_training import exhausted
from diffalign.eval.gallery import Entry, Gallery

__all__ = ["EVERY", "Level", "Sign", "signs"]

EVERY: tuple[Callable[[Gallery, Entry], Sign], ...] = (
    traded,
    diversity,
    look,
    fragile,
    prompt_blind,
    unasked_text,
    exhausted,
    duplicates,
)


def signs(gallery: Gallery) -> list[Sign]:
    """All signs of each contestant in the order of the page, without the baseline and its noise floor."""
    judged = [e for name, e in gallery.entries.items() if name != gallery.asked.baseline and e.about.again is None]
    return [sign(gallery, entry) for entry in judged for sign in EVERY]

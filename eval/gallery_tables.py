"""The tables of an evaluation as text: Markdown for changes between commits, CSV for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from diffalign.eval.report import number, signed

UP, DOWN = "\N{BLACK UP-POINTING TRIANGLE}", "\N{BLACK DOWN-POINTING TRIANGLE}"
UP_OPEN, DOWN_OPEN = "\N{WHITE UP-POINTING TRIANGLE}", "\N{WHITE DOWN-POINTING TRIANGLE}"
COLUMNS = (
    "contestant", "reward", "trained on", "prompts", "images scored", "invalid", "mean", "low", "high", "delta",
    "delta low", "delta high", "wins", "ties", "losses", "win rate", "sign test p", "Holm p",
)  # fmt: skip


def mark(delta: Mapping[str, Any] | None) -> str:
    """Filled where the difference holds after Holm's correction, open where its own interval alone excludes zero."""
    if delta is None or delta["direction"] == "open":
        return ""
    if delta["holds"]:
        return UP if delta["direction"] == "up" else DOWN
    return UP_OPEN if delta["direction"] == "up" else DOWN_OPEN


def markdown(numbers: Mapping[str, Any]) -> str:
    """The table of rewards: mean and half its 95 % interval, and the difference from the baseline."""
    rewards, base = numbers["rewards"], numbers["asked"]["baseline"]
    header = ["", *(_cell(r) + (" (trained)" if found["trained"] else "") for r, found in rewards.items())]
    lines = [header, ["---", *["---:"] * len(rewards)]]
    for row in numbers["contestants"]:
        name = row["name"]
        floor = " (other seeds)" if name in numbers["noise"] else ""
        cells = [_cell(name) + floor]
        for found in rewards.values():
            own = found["models"][name]
            text = f"{number(own['mean'])} ± {number(own['half'])}"
            text = f"**{text}**" if name in found["best"] else text
            delta = own["delta"]
            cells.append(text if delta is None else f"{text} ({signed(delta['mean'])}{mark(delta)})")
        lines.append(cells)
    asked = numbers["asked"]
    told = [
        f"{counted(numbers['prompts'], 'prompt')} ({_cell(asked['prompts'])}), "
        f"{counted(asked['images_per_prompt'], 'image')} each, "
        f"{asked['width']} by {asked['height']} pixels; ± is half a 95 % bootstrap interval over prompts.",
        f"In brackets the paired difference from {_cell(base)}: {UP}{DOWN} it holds after Holm's correction over all "
        f"rewards and contestants, {UP_OPEN}{DOWN_OPEN} its own 95 % interval alone excludes zero.",
    ]
    problems = [f"* {_cell(problem)}" for problem in numbers["problems"]]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return "\n\n".join(filter(None, [table, "\n".join(told), "\n".join(problems)])) + "\n"


def _cell(text: str) -> str:
    """Text of others in a line of Markdown, where some signs would be markup."""
    plain = " ".join(text.split())
    for sign in "\\`*_[]<>|#":
        plain = plain.replace(sign, "\\" + sign)
    return plain.replace("\\<", "&lt;").replace("\\>", "&gt;")


def comma_separated(numbers: Mapping[str, Any]) -> str:
    """A line a contestant and reward, numbers in full."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(COLUMNS)
    for row in numbers["contestants"]:
        for reward, found in numbers["rewards"].items():
            own = found["models"][row["name"]]
            delta = own["delta"] or {}
            keys = ("mean", "low", "high", "wins", "ties", "losses", "win_rate", "p", "holm")
            out.writerow([
                row["name"], reward, "yes" if own["trained"] else "no", own["n"], own["scored"], own["invalid"],
                own["mean"], own["low"], own["high"], *(delta.get(key) for key in keys),
            ])  # fmt: skip
    return text.getvalue()


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}" + "s" * (n != 1)

"""Reading a run folder: config.yaml, metrics.jsonl, eval/NNNN.json and images/; any of them may be missing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from diffalign.types import UserError


class Sample(BaseModel):
    """One evaluated image; a score that is missing, null or NaN does not apply to it."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    seed: int
    tag: str = ""
    scores: dict[str, float | None]

    def score(self, metric: str) -> float:
        value = self.scores.get(metric)
        return math.nan if value is None else value


class Evaluation(BaseModel):
    """What eval/NNNN.json holds: the same prompts and seeds each time; epoch 0 is the base model."""

    model_config = ConfigDict(frozen=True)

    epoch: int
    steps: int | None = None
    seconds: float | None = None
    samples: list[Sample]

    @property
    def name(self) -> str:
        return "base" if self.epoch == 0 else f"epoch {self.epoch}"

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(metric for sample in self.samples for metric in sample.scores))


@dataclass(frozen=True)
class Run:
    path: Path
    config: dict[str, Any]
    config_text: str
    train: list[dict[str, Any]]  # metrics lines of phase "train", one an epoch, in order
    evaluations: list[Evaluation]  # in order of epochs; those without samples are left out

    @property
    def base(self) -> Evaluation | None:
        return self.evaluations[0] if self.evaluations else None

    @property
    def final(self) -> Evaluation | None:
        return self.evaluations[-1] if len(self.evaluations) > 1 else None

    def images(self, evaluation: Evaluation) -> dict[int, Path]:
        """Sample index -> its PNG; file k shows the first image of prompt k, samples list them all."""
        folder = self.path / "images" / f"eval_{evaluation.epoch:04d}"
        each = int((self.config.get("evaluation") or {}).get("images_per_prompt", 1))
        found = {int(p.stem) * each: p for p in sorted(folder.glob("*.png")) if p.stem.isdigit()}
        return {i: p for i, p in found.items() if i < len(evaluation.samples)}

    def grid(self, evaluation: Evaluation) -> Path | None:
        path = self.path / "images" / f"eval_{evaluation.epoch:04d}.png"
        return path if path.is_file() else None

    def column(self, name: str) -> list[float]:
        """One metric over the training epochs, NaN where a line lacks it."""
        return [float(line.get(name, math.nan)) for line in self.train]


def read(folder: Path | str) -> Run:
    """Raises UserError when the folder is no run folder or one of its files cannot be read."""
    path = Path(folder)
    metrics, evals = path / "metrics.jsonl", sorted((path / "eval").glob("*.json"))
    if not metrics.is_file() and not evals:
        raise UserError(f"{path} is not a run folder: it has neither metrics.jsonl nor eval/*.json")
    config_text = (path / "config.yaml").read_text() if (path / "config.yaml").is_file() else ""
    try:
        config = yaml.safe_load(config_text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path / 'config.yaml'} is not valid YAML: {str(error).splitlines()[0]}") from error
    evaluations = [e for e in map(_evaluation, evals) if e.samples]
    return Run(
        path=path,
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        train=_train_lines(metrics) if metrics.is_file() else [],
        evaluations=sorted(evaluations, key=lambda e: e.epoch),
    )


def _evaluation(path: Path) -> Evaluation:
    try:
        return Evaluation.model_validate(json.loads(path.read_text()))
    except (json.JSONDecodeError, ValidationError) as error:
        raise UserError(f"{path} is not an evaluation file: {str(error).splitlines()[0]}") from error


def _train_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of phase train by epoch. After a resume an epoch may appear twice: the later line counts."""
    text = path.read_text()
    by_epoch: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if entry["phase"] == "train":
                by_epoch[int(entry["epoch"])] = entry
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(text.splitlines()) and not text.endswith("\n"):
                break  # the run was cut off, or is writing this very line
            raise UserError(f"{path}:{number} is not a metrics line with 'epoch' and 'phase'") from error
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]

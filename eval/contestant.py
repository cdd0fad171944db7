"""Who takes part in an evaluation: `NAME=SOURCE[+METHOD[:OPTION=VALUE,...]][@KEY=VALUE,...]`, as one writes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffalign import few_steps, pipelines, reward_entries
from diffalign.config_help import validated
from diffalign.eval.records import digest_of
from diffalign.few_steps import FewSteps
from diffalign.pipelines import DTYPES, embedded_names, embedded_path
from diffalign.sections import Sampling
from diffalign.steering import Steering, parse_options, resolve
from diffalign.types import UserError

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
AGAIN = "-again"  # the noise floor's name is the baseline's with this behind it
TAKEN = ("eval.json", "prompts.jsonl", "report.json", "report.md", "index.html", "img")
LORA_FILE = "pytorch_lora_weights.safetensors"
KERNELS = ("ode", "dpm2")
HELP = (
    "NAME=SOURCE, such as base=tiny-sd3, grpo=runs/grpo (a training run), style=lora_folder@base=tiny-sd3, "
    "fk=tiny-sd3+fk:particles=8 (steered) or few=tiny-sd3@timesteps=1000/500,eta=0.9; the first is the baseline"
)


@dataclass(frozen=True)
class Wanted:
    """A contestant as the command line asks for it.

    Attributes:
        kind: model, run, lora or steered.
        model: of its base: an embedded name, a folder or a hub id.
        lora, run: folders, where it has them.
        weights: 'moving average' or 'live' of a run; 'as they are' of the others.
        steps, timesteps, eta, guidance, kernel: of its own, where it has any; those of a distilled model are.
        again: it is the baseline with other seeds.
        trained_on: names of the rewards of its run.
    """

    name: str
    spec: str
    kind: str
    model: str
    revision: str | None = None
    lora: Path | None = None
    run: Path | None = None
    weights: str = "as they are"
    method: str = ""
    trained_on: tuple[str, ...] = ()
    steering: Steering | None = None
    steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    eta: float | None = None
    guidance: float | None = None
    kernel: str | None = None
    dtype: str | None = None
    again: bool = False


def parse(texts: Sequence[str]) -> list[Wanted]:
    """Raises UserError for what cannot be read or found, and for a name that is given twice or is no file name."""
    found: dict[str, Wanted] = {}
    for text in texts:
        one = _parse(text)
        if one.name in found:
            raise UserError(f"two models are called '{one.name}'; give one of them another name")
        found[one.name] = one
    return list(found.values())


def _parse(text: str) -> Wanted:
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise UserError(f"--models {text!r}: write NAME=SOURCE, such as base=tiny-sd3")
    if not SAFE_NAME.fullmatch(name) or name.endswith("."):
        raise UserError(
            f"--models {text!r}: the name {name!r} names a folder too; use letters, digits, '.', '_' and '-'"
        )
    if name.endswith(AGAIN) or name.lower() in TAKEN:
        raise UserError(f"--models {text!r}: the evaluation uses the name {name!r} itself; choose another")
    source, _, written = _split(rest, "@", r"\w+=")
    source, _, steering = _split(source, "+", r"[a-z]\w*(:|$)")
    options = _options(text, written)
    method = resolve({"select": "best", **parse_options(steering, f"--models {text!r}")}) if steering else None
    about = _source(text, source, options)
    found = [about.get(key) for key in ("model", "lora", "revision")]
    known = about.pop("few_steps", None) or pipelines.few_steps(*found)
    own: dict[str, Any] = {k: options[k] for k in ("steps", "guidance", "kernel", "dtype") if k in options}
    own |= _sampled(text, options, known)
    if method is not None and "kernel" in options:
        raise UserError(f"--models {text!r}: steering has a kernel of its own; leave kernel out")
    if method is not None:
        about["kind"] = "steered"
    return Wanted(name=name, spec=text, steering=method, **about, **own)


def _sampled(text: str, options: dict[str, Any], known: FewSteps | None) -> dict[str, Any]:
    """Timesteps and noise: those given, or what a distilled model remembers, which is then sampled without guidance."""
    where = f"--models {text!r}"
    if "kernel" in options and options.get("eta"):
        raise UserError(f"{where}: noise is that of the kernel cps; leave kernel or eta out")
    steps, timesteps = options.get("steps"), options.get("timesteps")
    eta = 0.0 if "kernel" in options else options.get("eta")
    found = validated(Sampling, few_steps.settings(steps, timesteps, eta, known, where), where)
    few = FewSteps.of(found)
    if few is None:
        return {"eta": eta, "kernel": found.kernel} if "eta" in options else {}
    kernel = options.get("kernel", found.kernel)
    return {
        "steps": len(few.timesteps),
        "timesteps": few.timesteps,
        "eta": few.eta,
        "kernel": kernel,
        "guidance": options.get("guidance", 1.0),
    }


def _split(text: str, mark: str, after: str) -> tuple[str, str, str]:
    """At the last `mark` that `after` follows, unless the whole text is a path that exists."""
    if Path(text).exists():
        return text, "", ""
    places = [m.start() for m in re.finditer(re.escape(mark) + f"(?={after})", text)]
    return (text[: places[-1]], mark, text[places[-1] + 1 :]) if places else (text, "", "")


TYPES: dict[str, Any] = {
    **dict.fromkeys(("kernel", "weights", "base", "dtype", "revision"), str),
    "steps": int,
    "timesteps": tuple,
    **dict.fromkeys(("guidance", "eta"), (int, float)),
}


def _options(text: str, written: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, written.split(",")):
        key, _, value = part.partition("=")
        if key not in TYPES:
            raise UserError(f"--models {text!r}: there is no option '{key}'; options: {', '.join(TYPES)}")
        known: Any = value if key == "revision" else reward_entries.yaml_value(value)
        if key == "timesteps":
            known = few_steps.numbers(value, "/", f"--models {text!r}: timesteps")
        odd = not isinstance(known, TYPES[key]) or isinstance(known, bool)
        if odd or (key == "steps" and int(known) < 1):
            raise UserError(f"--models {text!r}: {value!r} does not suit '{key}'")
        options[key] = known * 1.0 if key in ("guidance", "eta") else known
    if options.get("kernel", "ode") not in KERNELS:
        raise UserError(f"--models {text!r}: eta=0.9 alone gives noise, that of cps; kernels: {', '.join(KERNELS)}")
    if options.get("dtype", "fp32") not in DTYPES:
        raise UserError(f"--models {text!r}: dtypes are {', '.join(DTYPES)}")
    if options.get("guidance", 1) < 1:
        raise UserError(f"--models {text!r}: guidance must be at least 1")
    if "+" in options.get("base", "") and not Path(options["base"]).exists():
        raise UserError(f"--models {text!r}: write +METHOD before the @")
    if options.get("weights", "ema") not in ("ema", "live"):
        raise UserError(f"--models {text!r}: weights are ema, the moving average, or live")
    return options


def _source(text: str, source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Where its weights are."""
    path = Path(source).expanduser()
    if (path / "config.yaml").is_file():
        return _run(text, path, options)
    if "weights" in options:
        raise UserError(f"--models {text!r}: weights are of a training run, and '{source}' is none; leave it out")
    is_lora = (path / LORA_FILE).is_file() or (path.is_file() and path.suffix == ".safetensors")
    if is_lora:
        if "base" not in options:
            raise UserError(f"--models {text!r}: a LoRA needs its model; add @base=MODEL")
        return {"kind": "lora", "model": options["base"], "lora": path, "revision": options.get("revision")}
    if "base" in options:
        raise UserError(f"--models {text!r}: '{source}' is no LoRA, which alone takes a base; leave base out")
    if source not in embedded_names() and not path.exists() and source.count("/") != 1:
        known = ", ".join(embedded_names())
        raise UserError(
            f"--models {text!r}: there is no '{source}'; give a run folder, a model folder, a LoRA, a hub id or an "
            f"embedded name ({known})"
        )
    return {"kind": "model", "model": source, "revision": options.get("revision")}


def _run(text: str, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    if misplaced := [key for key in ("base", "revision") if key in options]:
        raise UserError(f"--models {text!r}: a training run knows its own model; leave {misplaced[0]} out")
    try:
        config: Any = yaml.safe_load((path / "config.yaml").read_text("utf-8"))
        model, algorithm, rewards = config["model"], config["algorithm"]["name"], config["rewards"]
        averaged = bool(config["trainer"].get("ema"))
        lora = config["adapter"]["name"] == "lora"
        sampling = config.get("sampling") or {}
        few = validated(Sampling, sampling, "sampling") if sampling.get("timesteps") else None
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--models {text!r}: '{path / 'config.yaml'}' is not that of a training run") from error
    live = options.get("weights") == "live"
    if live and averaged and not lora:
        raise UserError(f"--models {text!r}: the run kept the moving average of its weights alone; leave weights out")
    heads = tuple(dict.fromkeys(str(r["name"]) for r in rewards))
    found = {
        "kind": "run",
        "run": path,
        "method": str(algorithm),
        "trained_on": heads,
        "weights": "moving average" if averaged and not live else "live",
        "few_steps": None if few is None else FewSteps.of(few),
    }
    if lora:
        folder = path / ("lora_live" if live and averaged else "lora")
        _exists(text, folder)
        return {**found, "model": model["path"], "revision": model.get("revision"), "lora": folder}
    _exists(text, path / "model")
    return {**found, "model": str(path / "model")}


def _exists(text: str, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"--models {text!r}: '{folder}' is not there yet; let the run finish, or resume it")


def digest(wanted: Wanted) -> str:
    """Of the weights that lie on this machine: sizes of the files and samples of them, so that large ones cost nothing.

    Empty for a hub id without a LoRA, which its revision names.
    """
    places = [path for path in (wanted.lora, _folder(wanted.model)) if path is not None]
    found = []
    for place in places:
        files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
        found += [[str(file.name), file.stat().st_size, digest_of(_samples(file))] for file in files]
    return digest_of(found) if found else ""


def _folder(model: str) -> Path | None:
    path = embedded_path(model) if model in embedded_names() else Path(model).expanduser()
    return path if path.is_dir() else None


def _samples(file: Path, length: int = 1 << 20) -> bytes:
    """The first, the middle and the last MiB."""
    size, parts = file.stat().st_size, []
    with open(file, "rb") as opened:
        for start in (0, size // 2, size - length):
            opened.seek(max(0, start))
            parts.append(opened.read(length))
    return b"".join(parts)

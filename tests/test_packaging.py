"""What is built is what is tracked: wheel and source distribution hold every file of the package and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
MAPPED = ("rewards", "pipelines", "eval", "configs")  # top-level folders that import as diffalign.*


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to know which files belong to the project")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted(f for f in listed.stdout.split("\0") if f and (ROOT / f).is_file())


def installed_as(file: str) -> str | None:
    top = file.split("/")[0]
    return file if top == "diffalign" else f"diffalign/{file}" if top in MAPPED else None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("build")
    for file in tracked():
        (folder / "source" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / "source" / file)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "source"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def test_wheel_holds_the_tracked_files(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if ".dist-info/" not in n}
        wanted = {to: file for file in tracked() if (to := installed_as(file)) is not None}
        assert held == set(wanted)
        for to, file in wanted.items():
            assert archive.read(to) == (ROOT / file).read_bytes(), file
        (entry,) = [n for n in archive.namelist() if n.endswith("/entry_points.txt")]
        assert "diffalign = diffalign.__main__:run" in archive.read(entry).decode()
        assert any(n.endswith("/licenses/LICENSE") for n in archive.namelist())


def test_source_distribution_holds_code_and_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    wanted = {f for f in tracked() if installed_as(f) is not None or f.startswith("tests/")}
    assert wanted | {"pyproject.toml", "constraints.txt", "LICENSE", "README.md"} <= held


def test_wheel_runs_where_the_sources_are_not(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import diffalign, diffalign.rewards, diffalign.pipelines, diffalign.eval, diffalign.configs\n"
        "from diffalign import cli\n"
        "print(diffalign.__file__, list(diffalign.__path__))\n"
        "sys.exit(cli.main(['list']))"
    )
    (tmp_path / "empty").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "empty", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site" / "diffalign"
    assert done.stdout.splitlines()[0] == f"{site / '__init__.py'} {[str(site)]}"
    assert "shapes_demo" in done.stdout and "grpo" in done.stdout and "geneval" in done.stdout


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    found = {
        "diffalign" if to == "diffalign/__init__.py" else to.removesuffix("/__init__.py").replace("/", ".")
        for file in tracked()
        if file.endswith("__init__.py") and (to := installed_as(file)) is not None
    }
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_runs_uninstalled_from_the_repository_root(tmp_path: Path) -> None:
    for file in tracked():
        if installed_as(file) is not None and not file.startswith("diffalign/shapes/weights"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "rewards" / "brand_new.py").write_text('"""A file added after any install."""\n')
    done = subprocess.run([sys.executable, "-m", "diffalign", "list"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"brand_new +A file added after any install\.", done.stdout)


def test_the_core_asks_for_nothing_that_pins_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    core = {re.split(r"[^A-Za-z0-9_-]", d)[0] for d in project["dependencies"]}
    assert core.isdisjoint({"torchvision", "open_clip_torch", "xformers", "timm"})
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    assert {d.lower().replace("_", "-") for d in core} <= pinned
    assert "torch==2.13.0" in lines and not any("+" in line for line in lines if not line.startswith("#"))


def test_the_version_is_stated_once_in_each_place() -> None:
    import diffalign

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == diffalign.__version__


def test_every_extra_is_explained_and_all_means_all() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (everything,) = extras.pop("all")
    assert set(re.split(r"[\[\],]", everything)) - {"diffalign", ""} == set(extras) - {"dev"}
    readme = (ROOT / "README.md").read_text("utf-8")
    install = readme[readme.index("## Install") :].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", install.replace("`, `", "` `"))) >= set(extras) - {"dev"}


@pytest.mark.parametrize(
    ("extra", "module", "reward"),
    [("ocr", "rapidocr", {"name": "ocr"}), ("openclip", "open_clip", {"name": "openclip", "model": "hf-hub:a/b"})],
)
def test_a_reward_without_its_extra_says_how_to_get_it(
    extra: str, module: str, reward: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign.rewards import build
    from diffalign.types import UserError

    monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    with pytest.raises(UserError, match=re.escape(f"pip install 'diffalign[{extra}]'")):
        build([reward])


def test_tests_of_openclip_are_left_to_their_own_environment(pytestconfig: pytest.Config) -> None:
    assert "openclip" in pytestconfig.getini("norecursedirs")

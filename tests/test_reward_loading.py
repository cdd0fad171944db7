"""Where checkpoints of reward heads come from: embedded, a folder, the hub's cache, or a hub that a thread here plays."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel

from diffalign import rewards
from diffalign.rewards import _loading
from diffalign.rewards._hub import TEXT, Checkpoint, wanted
from diffalign.types import UserError

SHA = "0123456789abcdef0123456789abcdef01234567"


def cache(root: Path, model: str, refs: dict[str, str], files: dict[str, list[str]]) -> None:
    """A hub cache as the hub's client lays it out: refs name commits, commits hold files."""
    base = root / f"models--{model.replace('/', '--')}"
    for ref, commit in refs.items():
        (base / "refs").mkdir(parents=True, exist_ok=True)
        (base / "refs" / ref).write_text(commit)
    for commit, names in files.items():
        for name in names:
            path = base / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")


def test_embedded_and_local_folders(tmp_path: Path) -> None:
    assert Path(Checkpoint("tiny-clip").folder(), "config.json").is_file()
    assert Checkpoint(str(tmp_path)).folder() == str(tmp_path)
    assert Checkpoint("tiny-clip").cached() == Path(Checkpoint("tiny-clip").folder())
    for model in ("tiny-clip", str(tmp_path)):
        with pytest.raises(UserError, match="applies to hub ids only"):
            Checkpoint(model, "main").folder()
    with pytest.raises(UserError, match=r"model folder 'tiny-nothing' does not exist; .*tiny-clip"):
        Checkpoint("tiny-nothing").folder()
    assert Checkpoint("tiny-nothing").cached() is None


def test_offline_uses_the_cache_and_its_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    other = SHA[::-1]
    files = ["config.json", "model.safetensors"]
    cache(tmp_path, "owner/name", {"main": SHA, "v1": other}, {SHA: files, other: files})
    assert Path(Checkpoint("owner/name").folder()).name == SHA
    assert Path(Checkpoint("owner/name", "v1").folder()).name == other
    assert Path(Checkpoint("owner/name", other).folder(local_files_only=True)).name == other
    with pytest.raises(UserError, match=r"run `hf download owner/name --revision v2` where there is a network"):
        Checkpoint("owner/name", "v2").folder()

    cache(tmp_path, "owner/half", {"main": SHA}, {SHA: ["config.json"]})  # a download that broke off
    with pytest.raises(UserError, match=r"'owner/half' is not in the hub cache and HF_HUB_OFFLINE is set"):
        Checkpoint("owner/half").folder()
    assert Checkpoint("owner/half", only=TEXT).folder()

    cache(tmp_path, "owner/files", {"main": SHA}, {SHA: ["a.pt"]})
    assert Checkpoint("owner/files", None, ("a.pt",)).file().name == "a.pt"
    with pytest.raises(UserError, match=r"run `hf download owner/files b.pt` where"):
        Checkpoint("owner/files", None, ("b.pt",)).file()


def test_the_command_that_fetches() -> None:
    assert Checkpoint("o/n").command == "hf download o/n"
    assert Checkpoint("o/n", "v1", ("a b.pt",)).command == "hf download o/n 'a b.pt' --revision v1"
    assert Checkpoint("o/n", None, ("*.json", "a.pt")).command == "hf download o/n --include '*.json' --include a.pt"


def test_what_is_fetched() -> None:
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "open_clip_model.safetensors"]
    names += ["vocab.txt", "README.md", "onnx/model.safetensors"]
    assert wanted(names) == ["config.json", "model.safetensors", "vocab.txt"]
    assert wanted(["config.json", "pytorch_model.bin"]) == ["config.json", "pytorch_model.bin"]
    assert wanted(["model-00001-of-00002.safetensors", "model.safetensors.index.json"]) == [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert wanted(names, ("*.bin",)) == ["pytorch_model.bin"]


FILES = {"config.json": b'{"a": 1}', "model.safetensors": b"w" * 20_000_000, "other.bin": b"x" * 10}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as its client needs for one small model."""

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        if path in ("/api/models/owner/name", "/api/models/owner/name/revision/main"):
            listed = [{"rfilename": n, "size": len(c), "blobId": digest(c)} for n, c in FILES.items()]
            info = {"id": "owner/name", "sha": SHA, "cardData": {"license": "mit"}, "siblings": listed, "tags": []}
            self.reply(200, json.dumps(info).encode(), body)
        elif path.startswith("/api/models/owner/name/tree/"):
            tree = [{"type": "file", "path": n, "size": len(c), "oid": digest(c)} for n, c in FILES.items()]
            self.reply(200, json.dumps(tree).encode(), body)
        elif parts[:3] == ["owner", "name", "resolve"] and parts[-1] in FILES:
            self.reply(200, FILES[parts[-1]], body)
        elif path.startswith("/api/models/owner/name/revision/"):
            self.reply(404, b"{}", body, "RevisionNotFound")
        else:
            self.reply(401, b"{}", body, "RepoNotFound")

    def reply(self, code: int, content: bytes, body: bool, error: str | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{digest(content)}"')
        self.send_header("X-Repo-Commit", SHA)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


ASK = """
import sys
from diffalign.rewards._hub import Checkpoint
from diffalign.types import UserError
for revision in sys.argv[2:]:
    try:
        print(Checkpoint(sys.argv[1], None if revision == "-" else revision).folder())
    except UserError as error:
        print("UserError", error)
"""


def ask(endpoint: str, home: Path, model: str, *revisions: str) -> tuple[list[str], str]:
    """Lines of (stdout, stderr) of a process that asks for those revisions; its client reads the environment once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, model, *revisions],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_download_says_size_and_licence_first(hub: str, tmp_path: Path) -> None:
    (first, again, missing), said = ask(hub, tmp_path, "owner/name", "-", "-", "v9")
    assert Path(first).name == SHA
    assert sorted(p.name for p in Path(first).iterdir()) == ["config.json", "model.safetensors"]
    assert Path(first, "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert said.count("downloading owner/name: 0.02 GB, licence: mit") == 1  # the second time there is nothing to fetch
    assert again == first
    assert missing == "UserError 'owner/name' has no revision 'v9'; leave it out for the newest one"

    (absent,), _ = ask(hub, tmp_path, "owner/other", "-")
    assert absent.startswith("UserError the hub has no model 'owner/other'; check the name")

    # the same cache without a network, then another model
    (cached,), said = ask("http://127.0.0.1:9", tmp_path, "owner/name", "-")
    assert cached == first and "downloading" not in said
    (unreachable,), _ = ask("http://127.0.0.1:9", tmp_path, "owner/more", "-")
    assert unreachable.startswith("UserError 'owner/more' is not in the hub cache and fetching it failed (")
    assert "run `hf download owner/more`" in unreachable


def test_weights_of_every_form(tmp_path: Path) -> None:
    a, b = {"a": torch.ones(2)}, {"b": torch.zeros(3)}
    save_file(a, tmp_path / "model-00001-of-00002.safetensors")
    save_file(b, tmp_path / "model-00002-of-00002.safetensors")
    torch.save({"c": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert sorted(_loading.weights(tmp_path)) == ["a", "b"]
    assert sorted(_loading.weights(tmp_path / "pytorch_model.bin")) == ["c"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no weights"):
        _loading.weights(empty)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"12345")
    with pytest.raises(UserError, match="cannot read the weights"):
        _loading.weights(broken)


class Danger:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made-by-a-checkpoint",)


def test_a_checkpoint_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Danger()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="holds more than tensors"):
        _loading.weights(tmp_path / "bad.pt")
    assert not Path("made-by-a-checkpoint").exists()


def clip_folder(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
    """tiny-clip with other tensors in its file."""
    shutil.copytree(Checkpoint("tiny-clip").folder(), folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_every_key_must_fit(tmp_path: Path) -> None:
    def load(name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Any:
        return _loading.pretrained(CLIPModel, "w", clip_folder(tmp_path / name, change))

    norm = "vision_model.post_layernorm."
    model = load("same", dict)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match=f"does not fit the model: it lacks {norm}bias, {norm}weight; use the"):
        load("less", lambda state: {k: t for k, t in state.items() if not k.startswith(norm)})
    with pytest.raises(UserError, match="it has the unknown extra0, extra1, extra2 and 2 more keys"):
        load("more", lambda state: state | {f"extra{i}": torch.ones(1) for i in range(5)})
    with pytest.raises(UserError, match=f"it has another shape of {norm}weight; use the"):
        load("other", lambda state: state | {f"{norm}weight": torch.ones(3)})
    with pytest.raises(UserError, match="it lacks b and has the unknown a and has another shape of c"):
        _loading.complain("it", ["b"], ["a"], ["c"])


class Part(PreTrainedModel):
    """A model that says which keys of its files do not matter, within a module that is none."""

    config_class = PreTrainedConfig
    _keys_to_ignore_on_load_missing = [r"inner\.idle"]
    _keys_to_ignore_on_load_unexpected = [r"inner\.computed$"]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.inner = nn.Linear(2, 2)
        self.post_init()


def test_keys_that_a_part_declares_unused_do_not_count() -> None:
    lacks, holds = _loading.unneeded(nn.Sequential(nn.Sequential(Part(PreTrainedConfig()))))
    assert (lacks, holds) == ({r"inner\.idle"}, {r"inner\.computed$"})
    assert _loading.unneeded(nn.Linear(2, 2)) == (set(), set())


def test_precision(tmp_path: Path) -> None:
    source = Checkpoint("tiny-clip").folder()
    for dtype, expected in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        model = _loading.pretrained(CLIPModel, "tiny-clip", source, dtype=dtype)  # type: ignore[arg-type]
        assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.parametrize(
    "entry",
    [
        "geneval",
        {"name": "geneval", "detector": "mask2former", "revision": "main"},
        {"name": "vlm_echo", "server": "http://localhost:8000"},
        {"name": "yes_probability", "pixels": 4096},
        {"name": "dino_adversarial", "references": "shapes-outline", "multi_layer": {"layers": [1]}},
        {"name": "pickscore_adversarial", "references": "shapes-outline"},
        {"name": "remote", "url": "http://localhost:8600/"},
        {"name": "image_reward", "heads": [2, 2]},
    ],
)
@pytest.mark.parametrize("mode", ["python", "json"])
def test_saved_options_read_back_equal(entry: Any, mode: str) -> None:
    """A run's saved configuration names every option, those that do not apply as well."""
    reward = rewards.resolve(entry)
    assert rewards.resolve(reward.model_dump(mode=mode)) == reward


def test_tokenizer_must_be_the_encoders(tmp_path: Path) -> None:
    folder = Checkpoint("tiny-clip").folder()
    assert len(_loading.tokenizer(folder, 178)) == 178
    with pytest.raises(UserError, match="knows 178 tokens and the text encoder 49408"):
        _loading.tokenizer(folder, 49408)
    with pytest.raises(UserError, match="knows 178 tokens and the text encoder 100"):
        _loading.tokenizer(folder, 100)
    for name in ("config.json", "tokenizer_config.json"):  # without the vocabulary
        shutil.copy(Path(folder, name), tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        _loading.tokenizer(str(tmp_path), 178)


def test_code_in_a_checkpoint_is_never_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    with pytest.raises(UserError, match="is no transformers checkpoint"):
        _loading.configuration(str(tmp_path), "mine", "a CLIP")

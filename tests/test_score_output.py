"""What `diffalign score` leaves behind: the file it writes, what of it survives a failure, and its exit code."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from scored_pictures import grey, here, lines, score_into, truncated

from diffalign import cli, writing


def test_invalid_and_inapplicable_scores_are_counted_not_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey(tmp_path / "images", a=51, b=102, c=153, d=255, e=255, f=255, g=255)
    texts = ["one", "fail", "skip", "two", "two", "two", "two"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    output = tmp_path / "scores.jsonl"
    where = ["--images", str(tmp_path / "images"), "--prompts", str(tmp_path / "prompts.txt"), "--output", str(output)]
    assert cli.main(["score", "--reward", here("moody"), *where, "--device", "cpu"]) == 0
    found = lines(output)
    assert [line["prompt"] for line in found] == texts
    assert [line["scores"]["moody"] for line in found] == [pytest.approx(0.2), None, None, *[1.0] * 4]
    assert [line["valid"]["moody"] for line in found] == [True, False, *[True] * 5]
    details = {"size": 8, "map": [0.3333, 0.0]}
    failed = {**details, "error": "out of order"}
    assert [line["details"]["moody"] for line in found] == [details, failed, *[details] * 5]
    row, failure = capsys.readouterr().out.splitlines()[1:3]
    assert row.split() == ["moody", "5", "0.84", "0.3578", "0.2", "1", "1", "1"]
    assert failure == "moody: 'b.png': out of order"


def test_what_was_scored_before_a_damaged_file_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scores.jsonl"
    truncated(grey(tmp_path / "images", a=0, b=255) / "c.png")
    assert score_into(output, "jpeg", tmp_path / "images") == 2
    said = capsys.readouterr().err
    assert "cannot read the image" in said and said.endswith(f"; 2 of 3 images are in {output}\n")
    assert [line["image"] for line in lines(output)] == ["a.png", "b.png"]
    output.write_text("of an earlier run")
    truncated(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").unlink()
    assert score_into(output, "jpeg", tmp_path / "images") == 2
    assert capsys.readouterr().err.endswith("; no image was scored before\n")
    assert output.read_text() == "of an earlier run"


def test_what_was_scored_before_ctrl_c_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey(tmp_path / "images", a=0, b=51, c=255)
    (tmp_path / "prompts.txt").write_text("p\n" * 3)
    more = ["--batch", "1", "--prompts", str(tmp_path / "prompts.txt")]
    output = tmp_path / "scores.jsonl"
    assert score_into(output, f"jpeg,{here('fragile')}", tmp_path / "images", *more) == 130
    assert capsys.readouterr().err == f"2 of 3 images are in {output}\ninterrupted\n"
    assert [line["scores"]["fragile"] for line in lines(output)] == [0, pytest.approx(0.2)]


def test_a_reward_that_mostly_fails_is_exit_code_2_after_all_was_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey(tmp_path / "images", a=0, b=0, c=0, d=0)
    (tmp_path / "prompts.txt").write_text("fail\nskip\np\np\n")
    output = tmp_path / "scores.jsonl"
    asked = ["--prompts", str(tmp_path / "prompts.txt")]
    assert score_into(output, f"jpeg,{here('moody')}", tmp_path / "images", *asked) == 2
    said = capsys.readouterr()
    assert "moody: 'a.png': out of order" in said.out and len(lines(output)) == 4
    assert said.err == (
        "'moody' could not score 1 of the 3 images that it applies to, more than 20%; the table says why\n"
    )


def test_says_that_it_replaced_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, output = grey(tmp_path / "images", a=0, b=255), tmp_path / "scores.jsonl"
    said = f"2 images in {output}"
    for more in ("", ", in place of what it held"):
        assert score_into(output, "jpeg", images) == 0
        assert capsys.readouterr().out.splitlines()[-1] == said + more
        assert len(lines(output)) == 2


def test_a_full_disk_leaves_the_file_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    images, output = grey(tmp_path / "images", a=0), tmp_path / "scores.jsonl"
    output.write_text("of an earlier run")
    monkeypatch.setattr(writing, "sync", full)
    assert score_into(output, "jpeg", images) == 2
    said = capsys.readouterr()
    assert said.out.startswith("reward") and said.err.startswith(f"could not write '{output}': No space left")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "scores.jsonl"]
    assert output.read_text() == "of an earlier run"


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path) -> None:
    images, link, pipe = grey(tmp_path / "images", a=0), tmp_path / "link.jsonl", tmp_path / "pipe"
    link.symlink_to(tmp_path / "real.jsonl")
    assert score_into(link, "jpeg", images) == 0
    assert link.is_symlink() and len(lines(tmp_path / "real.jsonl")) == 1
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert score_into(pipe, "jpeg", images) == 0
    assert os.read(reader, 10_000) == (tmp_path / "real.jsonl").read_bytes() and pipe.is_fifo()
    os.close(reader)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "link.jsonl", "pipe", "real.jsonl"]


def test_a_stream_that_is_a_file_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, name, output = grey(tmp_path / "images", a=0), tmp_path / "stream", tmp_path / "redirected"
    with output.open("wb") as redirected:
        monkeypatch.setattr(writing, "STREAMS", {str(name): redirected.fileno()})
        os.write(redirected.fileno(), b"the table\n")
        assert score_into(name, "jpeg", images) == 0
        os.write(redirected.fileno(), b"the end\n")
    first, line, last = output.read_text().splitlines()
    assert (first, last) == ("the table", "the end") and line.startswith('{"image": "a.png"')
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "redirected"]


def test_file_names_of_another_encoding_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = grey(tmp_path / "images", a=0)
    try:
        (images / "a.png").rename(os.fsdecode(os.fsencode(images) + b"/bad\xff.png"))
    except OSError:
        pytest.skip("this file system keeps names in Unicode")
    assert score_into(tmp_path / "scores.jsonl", "jpeg", images) == 2
    assert "the file name 'bad\\udcff.png' in " in capsys.readouterr().err

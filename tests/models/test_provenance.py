"""The commit that results name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from models import provenance


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_code_counts_as_a_change_and_a_written_result_does_not(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    code, result = tmp_path / "code.py", tmp_path / provenance.RESULTS / "cpu.json"
    result.parent.mkdir(parents=True)
    code.write_text("1")
    result.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "start")
    head = git("rev-parse", "--short", "HEAD").strip()
    result.write_text("2")
    assert provenance.commit(tmp_path) == head
    code.write_text("2")
    assert provenance.commit(tmp_path) == head + "+changes"

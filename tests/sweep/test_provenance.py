"""A commit is stated only for this checkout, and marked if files differ from it."""

import subprocess
from pathlib import Path

from spatialvla_jax.sweep.provenance import commit, provenance


def test_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        user = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *user, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit(tmp_path) == ""
    git("init", "-q")
    assert commit(tmp_path) == ""  # nothing is committed yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    git("tag", "v1")
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("b")
    assert commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "folder").mkdir()
    assert commit(tmp_path / "folder") == ""


def test_provenance_is_plain_data() -> None:
    found = provenance()
    assert found.keys() == {"commit", "versions", "date"} and found["date"].endswith("+00:00")
    assert all(isinstance(version, str) for version in found["versions"].values())

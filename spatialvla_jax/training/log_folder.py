"""The folder of a run's logs, on the disk or in a bucket."""

import contextlib
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils.atomic import PREFIX
from spatialvla_jax.utils.storage import AnyPath, is_file, read_bytes, upload

UPLOAD_SECONDS = 10.0  # between two uploads to a bucket; every save uploads, too


class LogFolder:
    """Where a process writes its logs and traces: the run's `workdir`.

    The objects of a bucket cannot be appended to, so there `path` is a folder on this disk, whose changed files are
    uploaded whole: by `upload` before a checkpoint is saved, so that it has its metrics, and now and then in between.
    """

    def __init__(self, workdir: AnyPath) -> None:
        self.workdir, self.local = workdir, isinstance(workdir, Path)
        self.path = workdir if isinstance(workdir, Path) else Path(tempfile.mkdtemp(prefix="spatialvla-"))
        self.uploaded: dict[Path, tuple[int, int]] = {}  # size and time of change of what the bucket has
        self.pool, self.began = ThreadPoolExecutor(1), 0.0

    def fetch(self, name: str) -> Path:
        """→ the file `name`, which begins as the bucket has it."""
        if not self.local and is_file(self.workdir / name):
            (self.path / name).write_bytes(read_bytes(self.workdir / name))
        return self.path / name

    def upload(self) -> None:
        """Uploads what has changed. Raises StorageError or InputError."""
        if not self.local:
            self.pool.submit(self._upload).result()

    def upload_now_and_then(self) -> None:
        """The same in the background, every UPLOAD_SECONDS. Where it fails, the next save says why."""
        if not self.local and time.monotonic() - self.began >= UPLOAD_SECONDS:
            self.began = time.monotonic()
            self.pool.submit(self._upload)

    def _upload(self) -> None:
        for file in sorted(self.path.rglob("*")):
            if file.name.startswith(PREFIX) or not file.is_file():  # being written, and soon gone
                continue
            now = file.stat()
            state = now.st_size, now.st_mtime_ns
            if self.uploaded.get(file) != state:
                upload(file, self.workdir / str(file.relative_to(self.path)))
                self.uploaded[file] = state

    def close(self) -> None:
        """Uploads what the last save did not. Where it cannot be, the run's own error says why."""
        if not self.local:
            with contextlib.suppress(StorageError, InputError):
                self.upload()
            shutil.rmtree(self.path, ignore_errors=True)
        self.pool.shutdown()

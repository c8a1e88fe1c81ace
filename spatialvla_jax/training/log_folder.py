"""The folder of a run's logs, on disk or in a bucket."""

import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils.atomic import PREFIX
from spatialvla_jax.utils.progress import warn
from spatialvla_jax.utils.storage import AnyPath, is_file, read_bytes, upload

UPLOAD_SECONDS = 10.0  # between uploads to a bucket; every save uploads too


class LogFolder:
    """Where a process writes its logs and traces: the run's `workdir`.

    Objects in a bucket cannot be appended to. For a bucket, `path` is therefore a local folder whose changed files are
    uploaded whole. `upload` does so before each checkpoint, so that its metrics are complete, and now and then.
    """

    def __init__(self, workdir: AnyPath) -> None:
        self.workdir, self.local = workdir, isinstance(workdir, Path)
        self.path = workdir if isinstance(workdir, Path) else Path(tempfile.mkdtemp(prefix="spatialvla-"))
        self.uploaded: dict[Path, tuple[int, int]] = {}  # (size, mtime) of each file as last uploaded
        self.pool, self.began, self.failing = ThreadPoolExecutor(1), 0.0, False

    def fetch(self, name: str) -> Path:
        """The local path of the file `name`, after downloading the bucket's version if there is one."""
        if not self.local and is_file(self.workdir / name):
            (self.path / name).write_bytes(read_bytes(self.workdir / name))
        return self.path / name

    def upload(self) -> None:
        """Upload changed files. Raises StorageError or InputError."""
        if not self.local:
            self.pool.submit(self._upload).result()

    def upload_now_and_then(self) -> None:
        """Upload in the background, at most every UPLOAD_SECONDS. Warns when this begins to fail."""
        if not self.local and time.monotonic() - self.began >= UPLOAD_SECONDS:
            self.began = time.monotonic()
            self.pool.submit(self._try_upload)

    def _try_upload(self) -> None:
        try:
            self._upload()
            self.failing = False
        except (StorageError, InputError) as error:
            if not self.failing:
                warn(f"{error}; the logs are uploaded later")
            self.failing = True

    def _upload(self) -> None:
        for file in sorted(self.path.rglob("*")):
            if file.name.startswith(PREFIX) or not file.is_file():  # temporary files that are being written
                continue
            now = file.stat()
            state = now.st_size, now.st_mtime_ns
            if self.uploaded.get(file) != state:
                upload(file, self.workdir / str(file.relative_to(self.path)))
                self.uploaded[file] = state

    def close(self) -> None:
        """Upload what changed since the last save. If that fails, the files stay on this machine."""
        if not self.local:
            try:
                self.upload()
                shutil.rmtree(self.path, ignore_errors=True)
            except (StorageError, InputError) as error:
                warn(f"{error}; {self.path} has what was not uploaded")
        self.pool.shutdown()

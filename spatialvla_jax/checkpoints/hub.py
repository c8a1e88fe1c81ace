"""Checkpoints on the Hugging Face Hub: `org/name` or `org/name@revision`, accepted wherever a checkpoint is.

Downloads go into the Hub's own cache, where transformers and `hf` find them too. `huggingface_hub` is imported only
when needed. Its own downloads restart after an interruption; `_download` resumes from the bytes already on disk.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils.atomic import disk_errors
from spatialvla_jax.utils.progress import Bar, warn
from spatialvla_jax.utils.storage import AnyPath, as_path, exists, is_url, local_copy

# Short names for `fetch`.
KNOWN = {
    "paligemma2-3b-pt-224": "google/paligemma2-3b-pt-224",
    "zoedepth-nyu-kitti": "Intel/zoedepth-nyu-kitti",
    "spatialvla-4b-224-pt": "IPEC-COMMUNITY/spatialvla-4b-224-pt",
}
LOGIN = "`hf auth login`, or HF_TOKEN"
KINDS = ("spatialvla", "paligemma", "zoedepth")  # values of `model_type` that can be read here
CONFIG, WEIGHTS = "config.json", ("model.safetensors", "model.safetensors.index.json")
# Files to download from a repository's root: never a pickle. `convert --base` looks for the code of an export.
WANTED = ("*.json", "model*.safetensors", "*.model", "*_spatialvla.py", "README.md")
TRIES = 5  # retries in a row that make no progress, after which a download fails

_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([^\s@]+))?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")
_known_complete: set[Path] = set()  # folders of commits that this process has found complete


def find_checkpoint(path: str | os.PathLike[str], what: str = "checkpoint") -> AnyPath:
    """The location of the checkpoint that a user names. Only this function tells local paths, URLs and Hub ids apart.

    An existing local path wins. The files of an id are downloaded into the Hub's cache, or read from there if the Hub
    cannot be reached. A path that does not exist and is not an id is returned unchanged. Raises InputError or
    StorageError, with one sentence.
    """
    path = as_path(path, what)
    return path if (named := _hub_id(path)) is None else snapshot(*named)


def is_hub_id(path: str | os.PathLike[str]) -> bool:
    """Whether `find_checkpoint` would ask the Hub for it."""
    return _hub_id(as_path(path, "checkpoint")) is not None


def pinned(path: str) -> str:
    """Pin an id to a commit, `org/name@commit`, and download its files."""
    id, revision = parse_id(path)
    return f"{id}@{snapshot(id, revision).name}"


def parse_id(text: str) -> tuple[str, str | None]:
    """`org/name@revision` → (org/name, revision or None). Raises InputError."""
    if not (match := _ID.fullmatch(text)) or re.search(r"--|\.\.|\.git$", match[1]) or len(match[1]) > 96:
        raise InputError(f"{text!r} is not an id of the Hugging Face Hub: expected ORG/NAME or ORG/NAME@REVISION")
    return match[1], match[2]


def _hub_id(path: AnyPath) -> tuple[str, str | None] | None:
    if is_url(path) or exists(path):
        return None
    try:
        return parse_id(str(path))
    except InputError:
        return None


@dataclass(frozen=True)
class Repository:
    """A commit of a repository. `files` are those that a checkpoint needs: {name: (bytes, digest)}."""

    id: str
    commit: str
    files: Mapping[str, tuple[int, str]]
    licence: str
    gated: bool

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.files.values())


def look_up(id: str, revision: str | None = None) -> Repository:
    """Query the Hub about a repository. Raises InputError if it does not exist or holds no checkpoint that can be read
    here, and StorageError if the Hub cannot be reached."""
    with hub_errors(id, revision):
        from huggingface_hub import HfApi, constants

        info = HfApi().model_info(id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    files = {
        file.rfilename: (file.lfs.size, file.lfs.sha256) if file.lfs else (file.size or 0, file.blob_id or "")
        for file in info.siblings or ()
    }
    kind = (info.config or {}).get("model_type", KINDS[0])
    if CONFIG not in files or not any(name in files for name in WEIGHTS):
        names = sorted(files.keys() - {".gitattributes"})
        found = (
            f"found {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}" if names else ""
        )
        raise InputError(
            f"{id} has no supported checkpoint: expected {CONFIG} and {' or '.join(WEIGHTS)}, "
            f"{found or 'and it is empty'}"
        )
    if kind not in KINDS:
        raise InputError(f"{id} holds a model of type {kind!r}: expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    wanted = {name: file for name, file in files.items() if "/" not in name and any(fnmatch(name, p) for p in WANTED)}
    return Repository(id, info.sha or "", wanted, tags[0] if tags else "not stated", bool(info.gated))


def snapshot(id: str, revision: str | None = None, announce: Callable[[Repository], None] | None = None) -> Path:
    """A repository's folder in the Hub's cache. Downloads the files that it lacks; `announce` is called before. If the
    Hub cannot be reached, returns a complete cached copy. Raises InputError and StorageError."""
    _require_library(id)
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE).expanduser() / f"models--{id.replace('/', '--')}"
    if revision and (kept := root / "snapshots" / revision) in _known_complete and kept.is_dir():
        return kept
    try:
        if constants.HF_HUB_OFFLINE:
            raise InputError(f"{id} is not in the Hub's cache, {root.parent}, and HF_HUB_OFFLINE allows no download")
        repository = look_up(id, revision)
    except (InputError, StorageError) as error:
        offline = isinstance(error, StorageError) or constants.HF_HUB_OFFLINE
        if not offline or (kept := _cached(root, revision or "main")) is None:
            raise
        if isinstance(error, StorageError):
            warn(f"{error}; the copy in the cache is taken, {id}@{kept.name}")
        return kept
    if announce:
        announce(repository)
    folder = root / "snapshots" / repository.commit
    with disk_errors(folder), _locked(root):
        missing = {name: file for name, file in repository.files.items() if not (folder / name).exists()}
        _fetch_files(repository, {name: root / "blobs" / digest for name, (_, digest) in missing.items()})
        folder.mkdir(parents=True, exist_ok=True)
        for name, (_, digest) in missing.items():
            (folder / name).unlink(missing_ok=True)  # a dangling link
            (folder / name).symlink_to(Path("../../blobs", digest))
        if not _COMMIT.fullmatch(reference := revision or "main"):
            file = root / "refs" / reference
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(repository.commit)
    _known_complete.add(folder)
    return folder


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Let only one process at a time download a repository."""
    from huggingface_hub.utils import WeakFileLock

    file = root.parent / ".locks" / root.name / "spatialvla_jax.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(file):
        yield


def _cached(root: Path, revision: str) -> Path | None:
    """The folder of a revision in the cache; None if any of its weights is missing."""
    with suppress(OSError, ValueError):
        commit = revision if _COMMIT.fullmatch(revision) else (root / "refs" / revision).read_text().strip()
        folder = root / "snapshots" / commit
        single, index = (folder / name for name in WEIGHTS)
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {single.name}
        if (folder / CONFIG).exists() and all((folder / shard).exists() for shard in shards):
            return folder
    return None


def download(repository: Repository, folder: Path) -> None:
    """Download a repository's files into the new `folder`, which appears once they are complete. Until then they are in
    a hidden folder beside it, from which the next call resumes. Raises InputError and StorageError."""
    part = folder.absolute().with_name(f".{folder.name}.{repository.commit[:12]}.part")
    _fetch_files(repository, {name: part / name for name in repository.files})
    with disk_errors(folder):
        os.replace(part, folder)


def _fetch_files(repository: Repository, targets: Mapping[str, Path]) -> None:
    """Download the files that are not at their `targets` yet. Raises InputError before writing anything if the disk has
    too little room or the licence has not been accepted."""
    missing = {name: target for name, target in targets.items() if not target.exists()}
    if not missing:
        return
    have = sum(_size(target.with_name(f"{target.name}.part")) for target in missing.values())
    size = sum(repository.files[name][0] for name in missing)
    first = next(iter(missing.values()))
    disk = next(above for above in first.parents if above.exists())
    if (free := shutil.disk_usage(disk).free) < size - have:
        raise InputError(
            f"{repository.id} needs {size - have:,} bytes more, and the disk of {disk} has only {free:,} left"
        )
    with disk_errors(first.parent), hub_errors(repository.id):
        from huggingface_hub import HfApi, hf_hub_url

        if repository.gated:
            HfApi().auth_check(repository.id)
        with Bar(total=size, desc=repository.id, unit="B", unit_scale=True) as bar:
            for name, target in sorted(missing.items(), key=lambda item: repository.files[item[0]][0]):
                url = hf_hub_url(repository.id, name, revision=repository.commit)
                _download(url, target, *repository.files[name], bar)


def _download(url: str, target: Path, size: int, digest: str, bar: Bar) -> None:
    """Download one file. It gets its name once it is complete and its digest matches. An interrupted download resumes
    from the partial file beside it."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if _size(part) > size:
        part.unlink()
    bar.update(_size(part))
    tries = 0
    while (have := _size(part)) < size or not part.exists():
        try:
            _append(url, part, have, bar)
        except HfHubHTTPError:
            raise
        except HTTPError:  # the connection broke
            tries = 1 if _size(part) > have else tries + 1
            if tries > TRIES:
                raise
            time.sleep(min(2**tries / 4, 8))
    if have != size or _digest(part, digest) != digest:
        part.unlink()
        raise StorageError(f"{url} arrived damaged and was removed: rerun the command to download it again")
    os.replace(part, target)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _append(url: str, part: Path, have: int, bar: Bar) -> None:
    """Append the bytes after the first `have` to `part`, or write all of it if the server does not resume."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    options = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    with http_stream_backoff("GET", url, retry_on_exceptions=(), retry_on_status_codes=(), **options) as response:
        hf_raise_for_status(response)
        resumed = response.status_code == 206
        bar.update(0 if resumed else -have)
        with part.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                bar.update(len(chunk))


def _digest(file: Path, like: str) -> str:
    """Git's SHA-1 of a small file if `like`, the expected digest, has 40 digits; SHA-256 of a large (LFS) file."""
    total = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as content:
        while block := content.read(2**22):
            total.update(block)
    return total.hexdigest()


def check_push(id: str, private: bool) -> None:
    """Raises InputError if the user may not create the repository `id` or if it already has files, and StorageError if
    the Hub cannot be reached."""
    id, revision = parse_id(id)
    if revision:
        raise InputError(f"--push {id}@{revision} names a revision: a new repository has none")
    with hub_errors(id, writing=True):
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import RepositoryNotFoundError

        api = HfApi()
        if get_token() is None:
            raise InputError(f"--push {id} needs a token with write permission: {LOGIN}")
        user = api.whoami()
        names = [user["name"], *(org["name"] for org in user.get("orgs", ()))]
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise InputError(f"--push {id}: the token is read-only; set one with write permission by {LOGIN}")
        if id.partition("/")[0] not in names:
            raise InputError(f"--push {id}: the token can write only for {', '.join(names)}")
        try:
            info = api.model_info(id)
        except RepositoryNotFoundError:
            return
    if held := sorted({file.rfilename for file in info.siblings or ()} - {".gitattributes"}):
        raise InputError(f"--push {id}: it exists and holds {', '.join(held[:4])}: choose a new name")
    if private and not info.private:
        raise InputError(f"--push {id}: it exists and is public, but --private was given: choose a new name")


def push_export(export: AnyPath, id: str, private: bool) -> str:
    """Upload a folder as one commit of the new repository `id` → the commit's hash. If it raises InputError or
    StorageError, the repository has no files, or the Hub does not answer whether it has."""
    try:
        with local_copy(export) as folder, hub_errors(id, writing=True):
            from huggingface_hub import CommitOperationAdd, HfApi

            files = sorted(file for file in folder.rglob("*") if file.is_file())
            operations = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
            api = HfApi()
            api.create_repo(id, private=private, exist_ok=True)
            try:
                return api.create_commit(id, operations, commit_message="Export of spatialvla_jax").oid
            except Exception:  # the Hub may have made the commit, and only its response was lost
                with suppress(Exception):
                    info = api.model_info(id)
                    if {one.path_in_repo for one in operations} <= {one.rfilename for one in info.siblings or ()}:
                        return info.sha or ""
                raise
    except (InputError, StorageError) as error:
        raise type(error)(f"{error}; {export} is complete, `hf upload {id} {export}` uploads it") from error


def _require_library(id: str) -> None:
    if find_spec("huggingface_hub") is None:
        raise InputError(
            f"{id} does not exist locally, and reading the Hugging Face Hub needs huggingface_hub: "
            "`pip install 'spatialvla-jax[hub]'`"
        )


@contextmanager
def hub_errors(id: str, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Convert the Hub's errors to InputError or StorageError with a one-sentence message."""
    _require_library(id)
    try:
        yield
    except (InputError, StorageError):
        raise
    except Exception as error:
        if (explained := _explain(error, id, revision, writing)) is None:
            raise
        raise explained from error


def _explain(error: BaseException, id: str, revision: str | None, writing: bool) -> Exception | None:
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    page = f"{constants.ENDPOINT}/{id}"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    said = getattr(error, "server_message", None) or (f"status {status}" if status else str(error))
    reason = " ".join(said.split())[:200] or type(error).__name__
    if isinstance(error, RuntimeError) and error.__cause__:  # of an upload in a thread
        return _explain(error.__cause__, id, revision, writing)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return InputError(f"{id}: HF_HUB_OFFLINE allows no access to the Hub")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{id} is gated: accept its licence on {page}, then {LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{id} has no revision {revision or 'main'!r}: expected a branch, a tag or a whole commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{id} does not exist locally, and the Hub has no such model, or it is private: check the name, or {LOGIN}"
        )
    if status == 401:
        return InputError(f"{id}: the Hub does not accept the token: {LOGIN}")
    if status == 403:
        return InputError(f"{id} may not be {'written' if writing else 'read'} with this token ({reason}): {LOGIN}")
    if status in (409, 412):
        return InputError(f"{id} was changed by someone else meanwhile ({reason})")
    if status == 400 or isinstance(error, errors.HFValidationError):
        return InputError(f"{id} is refused by the Hub: {reason}")
    if status:
        return StorageError(f"{id}: the Hub fails ({reason}); the same command may succeed later")
    if isinstance(error, HTTPError):
        if writing:
            return StorageError(f"{id}: the Hub at {constants.ENDPOINT} cannot be reached ({reason})")
        return StorageError(
            f"{id} is not a folder here, and the Hub at {constants.ENDPOINT} cannot be reached to ask for it ({reason})"
        )
    if isinstance(error, json.JSONDecodeError):
        return StorageError(f"{id}: {constants.ENDPOINT} answers, but not as the Hub does")
    return None

"""Paths given by users, and objects in a bucket, against servers of both protocols."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest
import tensorstore
from etils import epath
from helpers.full_disk import no_room

from spatialvla_jax.actions import uniform_grid
from spatialvla_jax.actions.io import save_grid
from spatialvla_jax.checkpoints.orbax import TRIES, _location
from spatialvla_jax.cli import failure
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils import atomic, retries, storage
from spatialvla_jax.utils.outputs import OutputFile, OutputFolder, has_keys

DATA = bytes(range(256)) * 100


def test_paths_of_users(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert storage.as_path("~/x", "--out") == Path("/home/me/x")
    for written in ("gs://b/a/c", "gs:/b/a/c", Path("gs://b/a/c"), "GS://b/a/c/"):
        path = storage.as_path(written, "--out")
        assert isinstance(path, epath.Path) and str(path) == "gs://b/a/c" and storage.is_url(path)
    assert str(storage.as_path("s3://b/a", "--out").parent / "c") == "s3://b/c"
    assert not storage.is_url("a:b/c") and not storage.is_url(Path("/gs/b"))


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("https://host/x", "--out https://host/x is not a supported path: expected a local one, or gs://"),
        ("file:///x", "--out file://x is not a supported path"),
        ("gs://", "--out gs:// names no bucket"),
        ("~nobody-of-this-name/x", "--out ~nobody-of-this-name/x cannot be expanded"),
    ],
)
def test_paths_that_are_refused(written, sentence):
    with pytest.raises(InputError, match=sentence):
        storage.as_path(written, "--out")


@pytest.mark.parametrize(("library", "url", "extra"), [("gcsfs", "gs://b/x", "gcs"), ("s3fs", "s3://b/x", "s3")])
def test_missing_library(monkeypatch, library, url, extra):
    find = storage.importlib.util.find_spec
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None if name == library else find(name))
    with pytest.raises(InputError, match=rf"--out {url} needs {library}: `pip install 'spatialvla-jax\[{extra}\]'`"):
        storage.as_path(url, "--out")


def test_objects(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PART", 10_000)
    path = storage.as_path(f"{bucket.url}/a/b.bin", "--out")
    storage.put(path, DATA)
    assert storage.read_bytes(path) == DATA
    assert storage.is_file(path) and storage.is_dir(path.parent) and not storage.exists(path.parent / "other")
    size, version = storage.size_and_version(path)
    assert size == len(DATA) and storage.list_files(path.parent) == {"b.bin": (size, version)}
    assert storage.list_names(path.parent.parent) == ["a"] and storage.list_names(path.parent / "other") == []
    storage.put(path, DATA[:-1] + b"x")
    assert storage.size_and_version(path)[1] != version
    storage.download(path, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA[:-1] + b"x" == b"".join(storage.read_parts(path, len(DATA)))
    storage.upload(tmp_path / "copy", path.with_name("c"))
    for data in (b"", b"\r", b"a\r\n", b"\n--==0==--\n"):  # characters that may look like part of the request
        storage.put(path, data)
        (tmp_path / "copy").write_bytes(data)
        storage.upload(tmp_path / "copy", path.with_name("c"))
        assert storage.read_bytes(path) == storage.read_bytes(path.with_name("c")) == data
    storage.remove(path)
    storage.remove(path)
    assert sorted(storage.list_files(path.parent)) == ["c"]


def test_ranges(bucket, tmp_path):
    path, local = storage.as_path(f"{bucket.url}/b.bin", ""), tmp_path / "b.bin"
    storage.put(path, DATA)
    local.write_bytes(DATA)
    asked = [(local, 5, 3), (path, 0, 4), (path, 25_000, 600), (path, 25_000, 601), (path, 30_000, 1)]
    asked += [(path.with_name("other"), 0, 1), (local.with_name("other"), 0, 1)]
    read = storage.read_ranges(asked)
    assert read[:3] == [DATA[5:8], DATA[:4], DATA[25_000:]]
    assert [type(error) for error in read[3:]] == [EOFError, EOFError, InputError, FileNotFoundError]
    assert str(read[5]) == f"{bucket.url}/other does not exist"


def test_faults_are_mended_and_counted(bucket):
    path = storage.as_path(f"{bucket.url}/b.bin", "")
    storage.put(path, DATA)
    before = retries.counts()
    for fault in ({"status": 503, "every": 5}, {"status": 429, "every": 7}, {"cut": True, "every": 3}):
        bucket.proxy.add(**fault, pattern="GET")
    for start in range(20):
        assert storage.read_ranges([(path, start, 50)]) == [DATA[start : start + 50]]
    bucket.proxy.faults.clear()
    after = retries.counts()
    assert after["retries"] - before["retries"] == len(bucket.proxy.requests) - 21
    assert after["requests"] - before["requests"] == len(bucket.proxy.requests) - 1
    assert after["bytes"] - before["bytes"] == 20 * 50


def test_the_tries_of_tensorstore_are_counted_too(bucket, monkeypatch):
    """Covers a checkpoint's arrays."""
    monkeypatch.setitem(TRIES, "initial_delay", "1ms")
    store = tensorstore.KvStore.open(_location(f"{bucket.url}/arrays/")).result()
    before, _ = retries.counts(), bucket.proxy.requests.clear()
    bucket.proxy.add(status=503, count=2)
    for number in range(3):
        store.write(str(number), DATA).result()
        assert store.read(str(number)).result().value == DATA
    found = {key: count - before[key] for key, count in retries.counts().items()}
    assert found == {"requests": len(bucket.proxy.requests), "retries": 2, "bytes": 3 * len(DATA)}


def test_throttling_that_lasts(bucket, monkeypatch):
    path = storage.as_path(f"{bucket.url}/b.bin", "")
    storage.put(path, DATA)
    monkeypatch.setattr(retries, "PATIENCE", 0.05)
    bucket.proxy.add(status=429, body="slow down")
    reads = (storage.read_bytes, storage.list_files, storage.exists, storage.size_and_version)
    for call in (*reads, storage.check_writable, lambda path: storage.put(path, b"")):
        with pytest.raises(
            StorageError, match=rf"{bucket.url}.*: the storage failed for .* s, most recently with .*429"
        ):
            call(path)
    bucket.proxy.faults.clear()
    assert storage.read_bytes(path) == DATA


def test_a_server_that_hangs(gcs, monkeypatch):
    from aiohttp import ClientTimeout

    path = storage.as_path(f"{gcs.url}/b.bin", "")
    storage.put(path, DATA)
    monkeypatch.setattr(storage.filesystem(path), "requests_timeout", ClientTimeout(sock_read=0.3))
    gcs.proxy.add(delay=1, count=2)
    assert storage.read_bytes(path) == DATA and len(gcs.proxy.requests) >= 2


def test_a_request_whose_response_is_lost_is_repeated(bucket, tmp_path):
    """The server did it, and may refuse a repetition: the object exists already, or no longer does."""
    folder = storage.as_path(f"{bucket.url}/folder", "")
    names = ["a", "b/c", "b/d"]

    def lose(pattern: str, count: int = 1) -> None:
        bucket.proxy.faults[:] = []
        bucket.proxy.add(status=503, lost=True, pattern=pattern, count=count)

    for name in names:
        lose("POST|PUT")
        storage.put(folder / name, name.encode())
    lose("DELETE")
    storage.check_writable(folder / "new")
    lose("POST|PUT", count=len(names))
    bucket.proxy.add(status=503, lost=True, pattern="DELETE", count=len(names))
    storage.move_folder(folder, folder.with_name("moved"))
    assert storage.list_names(folder.parent) == ["moved"]
    assert [storage.read_text(folder.with_name("moved") / name) for name in names] == names
    lose("DELETE|POST", count=len(names))
    storage.filesystem(folder).rm(str(folder.with_name("moved")), recursive=True)  # as Orbax does
    assert storage.list_names(folder.parent) == []
    storage.put(folder, b"")
    lose("DELETE")
    storage.remove(folder)
    assert not storage.exists(folder)


def test_an_upload_in_parts_whose_last_response_is_lost(s3, tmp_path):
    """S3's documented response to the repetition; moto repeats the first response."""
    path, size = storage.as_path(f"{s3.url}/x", ""), 10 * 2**20
    (tmp_path / "x").write_bytes(bytes(size))
    ended = "<Error><Code>NoSuchUpload</Code><Message>It may have been aborted or completed.</Message></Error>"
    s3.proxy.add(status=503, lost=True, pattern="POST .*uploadId=", count=1)
    s3.proxy.add(status=404, body=ended, pattern="POST .*uploadId=", every=2)
    storage.filesystem(path).put_file(tmp_path / "x", str(path), chunksize=size // 2)
    assert storage.size_and_version(path)[0] == size
    s3.proxy.faults[:] = [s3.proxy.faults[1]]
    s3.proxy.faults[0].every = 1
    with pytest.raises(FileNotFoundError, match="aborted or completed"):
        storage.filesystem(path).put_file(tmp_path / "x", str(path), chunksize=size // 2)


def test_an_upload_of_which_nothing_arrived(gcs, tmp_path):
    path = storage.as_path(f"{gcs.url}/x", "")
    (tmp_path / "x").write_bytes(bytes(6 * 2**20))
    gcs.proxy.add(status=308, count=1, pattern="POST .*upload_id=")
    storage.upload(tmp_path / "x", path)
    assert storage.size_and_version(path)[0] == 6 * 2**20


def test_objects_that_cannot_be_removed(s3):
    """S3 names them in the response to a successful request."""
    path = storage.as_path(f"{s3.url}/folder/a", "")
    storage.put(path, b"")
    remove = functools.partial(storage.filesystem(path).rm, str(path.parent), recursive=True)
    for code, kind in (("AccessDenied", InputError), ("InternalError", StorageError)):
        body = (
            f"<DeleteResult><Error><Key>folder/a</Key><Code>{code}</Code><Message>No</Message></Error></DeleteResult>"
        )
        fault = s3.proxy.add(status=200, body=body, pattern="POST .*delete", count=1)
        if kind is InputError:
            with pytest.raises(kind, match="permission"), storage.storage_errors(path, "written"):
                remove()
        else:
            remove()  # the second try
        assert fault.seen and storage.exists(path) == (kind is InputError)


FORBIDDEN = {
    "gs": json.dumps({"error": {"message": "me@x does not have storage.objects.* access"}}),
    "s3": "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
}
ANONYMOUS = {
    "gs": json.dumps({"error": {"message": "Anonymous caller does not have access"}}),
    "s3": "<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist</Message></Error>",
}
FULL = {
    "gs": json.dumps({"error": {"message": "The quota of the bucket is used up"}}),
    "s3": "<Error><Code>QuotaExceeded</Code><Message>Bucket quota exceeded</Message></Error>",
}
READ_ONLY = {
    "gs": json.dumps({"error": {"message": "Object is under active Temporary hold or retention policy"}}),
    "s3": "<Error><Code>MethodNotAllowed</Code><Message>Not allowed</Message></Error>",
}


def test_sentences(bucket):
    scheme = bucket.url[:2]
    path = storage.as_path(f"{bucket.url}/b.bin", "")
    storage.put(path, DATA)
    wrong = storage.as_path(f"{bucket.url}-wrong/b.bin", "")
    calls = {
        "read": storage.read_bytes,
        "listed": lambda path: storage.list_files(path.parent),
        "written": lambda path: storage.put(path, b"x"),
    }
    for call in (*calls.values(), storage.exists):
        with pytest.raises(InputError, match=f"{wrong.parent}.*: there is no bucket '{wrong.parts[2]}'"):
            call(wrong)
    for done, call in calls.items():
        for status, body, kind, sentence in (
            (403, FORBIDDEN, InputError, "the permission (storage.objects|s3:)"),
            (401, ANONYMOUS, InputError, "there are no valid credentials .* use `"),
            (403, FULL, StorageError, "the bucket is full or a quota is used up"),
            (405 if scheme == "s3" else 403, READ_ONLY, InputError, "the bucket is read-only"),
        ):
            bucket.proxy.add(status=status, body=body[scheme])
            with pytest.raises(kind, match=f"{bucket.url}.* cannot be {done}: {sentence}") as failed:
                call(path)
            assert "\n" not in str(failed.value)
            bucket.proxy.faults.clear()


def test_credentials_that_stay_refused(gcs, monkeypatch):
    monkeypatch.setattr(retries, "PATIENCE", 0.05)
    gcs.proxy.add(status=401, body="expired", pattern="GET")
    with pytest.raises(InputError, match=rf"{gcs.url}/a/b cannot be read: there are no valid credentials"):
        storage.read_bytes(storage.to_path(f"{gcs.url}/a/b"))


def test_no_credentials(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nowhere")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    path = storage.as_path(f"{s3.url}/b.bin", "")
    (error,) = storage.read_ranges([(path, 0, 1)])
    sentence = f"{path} cannot be read: there are no valid credentials .*; use `aws configure`, or AWS_ACCESS_KEY_ID"
    for call in (lambda: storage.read_bytes(path), lambda: storage.exists(path), lambda: raise_(error)):
        with pytest.raises(InputError, match=sentence):
            call()


def raise_(error: Exception):
    raise error


@pytest.mark.parametrize("name", ["s3://Not a name!/x", "s3://b/x"])
def test_names_that_no_bucket_has(s3, name):
    with pytest.raises(InputError, match=name):
        storage.read_bytes(storage.as_path(name, ""))


@pytest.mark.slow
def test_tensorflow_has_no_part_in_it(gcs):
    """TensorFlow and TFDS are imported first, and etils has made its choice."""
    code = f"""
import tensorflow, tensorflow_datasets
from etils import epath
assert not epath.Path("/nowhere").exists()
from spatialvla_jax.utils import retries, storage
path = storage.as_path("{gcs.url}/x", "")
path.write_text("hello")
assert path.read_text() == "hello" and retries.counts()["requests"] > 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_and_folders_appear_whole(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = storage.as_path(f"{bucket.url}/new/x.json", "")
    atomic.write_json(path, {"a": 1})
    assert json.loads(storage.read_bytes(path)) == {"a": 1}
    with pytest.raises(ZeroDivisionError), atomic.replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert json.loads(storage.read_bytes(path)) == {"a": 1}

    folder = path.parent / "index"
    for names in (("meta.json", "a.bin", "parts/b.bin"), ("meta.json", "c.bin")):
        bucket.proxy.requests.clear()
        with atomic.replacing(folder, "meta.json") as temporary:
            for name in names:
                (temporary / name).parent.mkdir(exist_ok=True, parents=True)
                (temporary / name).write_text(name)
            assert not [request for request in bucket.proxy.requests if "GET" not in request.line]
        uploads = [request.line for request in bucket.proxy.requests if request.line.startswith(("POST", "PUT"))]
        assert len(uploads) == len(names)
        files = {name for name in ("meta.json", "a.bin", "parts/b.bin", "c.bin") if storage.exists(folder / name)}
        assert files == set(names)
    bucket.proxy.add(status=403, body=FORBIDDEN[bucket.url[:2]], pattern="POST|PUT", every=2)
    with pytest.raises(InputError, match="permission"), atomic.replacing(folder, "meta.json") as temporary:
        temporary.mkdir()
        for name in ("meta.json", "d.bin", "e.bin"):
            (temporary / name).write_text(name)
    assert not storage.exists(folder / "meta.json")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_by_the_name_that_the_user_knows(tmp_path):
    with no_room(10), pytest.raises(OSError) as failed:
        atomic.write_json(tmp_path / "x.json", ["a"] * 10)
    assert failure(failed.value, joined=False) == (1, f"{tmp_path}/x.json: File too large")
    with no_room(10), pytest.raises(InputError, match=f"^{tmp_path}/x.json cannot be written: File too large$"):
        save_grid(tmp_path / "x.json", uniform_grid((1,) * 6))
    assert not list(tmp_path.iterdir())


def test_new_directories(gcs):
    path = storage.as_path(f"{gcs.url}/export", "")
    with atomic.new_directory(path, "config.json") as temporary:
        (temporary / "config.json").write_text("{}")
        (temporary / "weights").write_text("…")
    again = atomic.new_directory(path, "config.json")
    with pytest.raises(InputError, match=f"{path} exists; choose a new destination"), again:
        pass
    storage.remove(path / "config.json")
    cut = f"{path} exists without config.json, so its upload was cut short: remove it or choose a new destination"
    with pytest.raises(InputError, match=cut), atomic.new_directory(path, "config.json"):
        pass


def test_outputs_are_checked_before(bucket):
    """The check leaves nothing behind."""
    path = storage.as_path(f"{bucket.url}/out.json", "")
    file, folder = OutputFile(has_keys("mine")), OutputFolder("config.json", "made_by", "me", names=("weights",))
    file.check(path, "--out")
    folder.check(path.parent / "run", "--workdir")
    assert storage.list_names(path.parent) == []
    storage.put(path, b'{"mine": 1}')
    file.check(path, "--out")
    storage.put(path, b'{"yours": 1}')
    with pytest.raises(InputError, match=f"--out {path} exists and was not written by this command"):
        file.check(path, "--out")
    with pytest.raises(InputError, match=f"--out {path} already exists"):
        OutputFile().check(path, "--out")
    storage.put(path.parent / "run" / "weights", b"")
    with pytest.raises(InputError, match=f"--workdir {path.parent / 'run'} holds weights, which this command did not"):
        folder.check(path.parent / "run", "--workdir")
    storage.put(path.parent / "run" / "config.json", b'{"made_by": "me"}')
    folder.check(path.parent / "run", "--workdir")
    with pytest.raises(InputError, match=f"--out {path.parent / 'run'} is a folder: expected the name of a file"):
        file.check(path.parent / "run", "--out")
    for wrong, sentence in ((storage.as_path(f"{bucket.url}-wrong/x", ""), "there is no bucket"), (path, "permission")):
        if wrong == path:
            bucket.proxy.add(status=403, body=FORBIDDEN[bucket.url[:2]], pattern="POST|PUT")
        for check in (file, folder):
            with pytest.raises(InputError, match=f"--out {bucket.url}.*{sentence}"):
                check.check(wrong.with_name("new"), "--out")

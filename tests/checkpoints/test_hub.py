"""Hugging Face Hub ids in place of paths: downloads, the cache, errors. The Hub is a server on loopback."""

from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.checkpoints import equal

pytest.importorskip("huggingface_hub")
from helpers.hub_server import Fault, Hub, hub_server  # noqa: F401
from huggingface_hub import constants

from spatialvla_jax.checkpoints import hub, read_checkpoint, write_huggingface
from spatialvla_jax.checkpoints.load import fingerprint
from spatialvla_jax.errors import InputError, StorageError


@pytest.fixture
def server(hub_server, monkeypatch) -> Hub:  # noqa: F811
    monkeypatch.setattr(hub, "_known_complete", set())
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=lambda seconds: None))
    return hub_server


@pytest.fixture(scope="session")
def export(checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "export"
    write_huggingface(path, checkpoint, files={"README.md": "---\nlicense: gemma\n---\n"})
    return path


def downloads(server: Hub) -> list[str]:
    return [request for request in server.requests if "/blobs/" in request or "/resolve/" in request]


def test_an_id_is_read_as_its_folder(server, export, checkpoint):
    server.commit("org/name", {file.name: file.read_bytes() for file in export.iterdir()} | {"old.bin": b"pickle"})
    assert equal(read_checkpoint("org/name"), read_checkpoint(export))
    assert equal(read_checkpoint(Path("org/name@main")), read_checkpoint(export))
    assert not [request for request in server.requests if "old.bin" in request]
    asked = len(downloads(server))
    read_checkpoint("org/name")
    assert len(downloads(server)) == asked  # everything is in the cache


def test_a_local_folder_of_that_name_wins(server, export):
    Path("org").mkdir()
    Path("org/name").symlink_to(export)
    assert hub.find_checkpoint("org/name") == Path("org/name") and not hub.is_hub_id("org/name")
    assert server.requests == []


def test_revisions(server, export, checkpoint):
    """A tag and a commit keep their meaning when the branch moves; a policy's name contains the commit."""
    first = server.commit("org/name", export, ref="v1")
    server.commit("org/name", export)
    changed = server.commit("org/name", {p.name: p.read_bytes() for p in export.iterdir()} | {"x.json": b"{}"})
    assert hub.pinned("org/name@v1") == f"org/name@{first}" and hub.pinned("org/name") == f"org/name@{changed}"
    assert hub.find_checkpoint(f"org/name@{first}").name == first
    assert first in fingerprint("org/name@v1") and changed in fingerprint("org/name")
    count = len(server.requests)
    hub.find_checkpoint(f"org/name@{first}")
    assert len(server.requests) == count  # a cached commit needs no request


def test_the_cache_serves_where_the_hub_cannot_be_reached(server, export, monkeypatch, capsys):
    commit = server.commit("org/name", export)
    folder = hub.find_checkpoint("org/name")
    server.faults.append(Fault("GET /api/models/org/name", status=503))
    assert hub.find_checkpoint("org/name") == folder
    assert f"the copy in the cache is taken, org/name@{commit}" in capsys.readouterr().err
    server.close()
    assert hub.find_checkpoint("org/name") == folder
    capsys.readouterr()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.find_checkpoint("org/name") == folder == hub.find_checkpoint(f"org/name@{commit}")
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"^org/other is not in the Hub's cache, .*HF_HUB_OFFLINE allows no download$"):
        hub.find_checkpoint("org/other")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"^org/name is not in the Hub's cache"):
        hub.find_checkpoint("org/name")


def test_a_cache_that_transformers_filled_is_completed(server, export):
    """transformers caches fewer files than we read."""
    from huggingface_hub import hf_hub_download

    server.commit("org/name", export)
    for name in ("config.json", "model.safetensors"):
        hf_hub_download("org/name", name, cache_dir=constants.HF_HUB_CACHE)
    large = len([request for request in server.requests if "GET /blobs/" in request])
    assert equal(read_checkpoint("org/name"), read_checkpoint(export))
    assert len([request for request in server.requests if "GET /blobs/" in request]) == large == 1


def test_a_cut_download_goes_on(server, export, capsys):
    """A download resumes in the same process and in a later one: bytes that arrived are not requested again."""
    server.commit("org/name", export)
    size = (export / "model.safetensors").stat().st_size
    server.faults.append(Fault("GET /blobs/", cut=size // 2))
    folder = hub.find_checkpoint("org/name")
    assert [r.partition("bytes=")[2] for r in server.requests if "GET /blobs/" in r] == ["", f"{size // 2}-"]
    assert (folder / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()

    server.commit("org/other", export)
    server.requests.clear()
    blob = folder.parents[1].with_name("models--org--other") / "blobs"
    server.faults += [Fault("GET /blobs/", cut=size // 3), Fault("GET /blobs/", count=9, status=503)]
    with pytest.raises(StorageError, match=r"^org/other: the Hub fails \(.*\); the same command may succeed later$"):
        hub.find_checkpoint("org/other")
    assert not list(blob.parent.glob("snapshots/*")) and len(list(blob.glob("*.part"))) == 1
    server.faults.clear()
    hub.find_checkpoint("org/other")
    assert server.requests[-1].endswith(f"bytes={size // 3}-") and not list(blob.glob("*.part"))


def test_damaged_bytes_are_not_kept(server, export):
    server.commit("org/name", export)
    digest = hub.look_up("org/name").files["model.safetensors"][1]
    server.faults.append(Fault(f"GET /blobs/{digest}", status=200, body=bytes(len(server.blobs[digest]))))
    with pytest.raises(StorageError, match="arrived damaged and was removed: rerun the command to download it again"):
        hub.find_checkpoint("org/name")
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.part")) and not list(Path(".").rglob("snapshots"))


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    {
        "gone": (
            "org/gone",
            InputError,
            "org/gone does not exist locally, and the Hub has no such model, or it is private",
        ),
        "private": ("org/private", InputError, "org/private does not exist locally, and the Hub has no such model"),
        "gated": (
            "org/gated",
            InputError,
            r"org/gated is gated: accept its licence on http\S+/org/gated, then `hf auth",
        ),
        "revision": ("org/name@v9", InputError, "org/name has no revision 'v9': expected a branch, a tag or a whole c"),
        "pickle": (
            "org/bin",
            InputError,
            r"org/bin has no supported checkpoint: .* found config\.json, pytorch_model\.bin",
        ),
        "empty": ("org/empty", InputError, r"org/empty has no supported checkpoint: .* and it is empty"),
        "llama": (
            "org/llama",
            InputError,
            "org/llama holds a model of type 'llama': expected spatialvla, paligemma or",
        ),
        "malformed": ("org/na--me", InputError, "org/na--me does not exist, and is not an id of the Hugging Face Hub"),
        "three": ("org/name/sub", InputError, "org/name/sub does not exist, and is not an id of the Hugging Face Hub"),
        "half": ("org/name@", InputError, "org/name@ does not exist, and is not an id of the Hugging Face Hub"),
        "alone": ("name", InputError, "name does not exist"),
        "down": ("org/down", StorageError, r"org/down: the Hub fails \(.*\); the same command may succeed later"),
        "other": ("org/html", StorageError, "org/html: http.* answers, but not as the Hub does"),
    }.values(),
)
def test_what_cannot_be_read_is_said_in_one_sentence(server, export, text, error, sentence):
    """And nothing is written."""
    server.commit("org/name", export)
    server.commit("org/private", export, private=True)
    server.commit("org/gated", export, gated=True)
    server.commit("org/bin", {"config.json": b"{}", "pytorch_model.bin": b"x" * 2000})
    server.commit("org/empty", {".gitattributes": b""})
    server.commit("org/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    server.faults = [Fault("org/down", status=502), Fault("org/html", status=200, body=b"<html>")]
    with pytest.raises(error, match=f"^{sentence}") as raised:
        read_checkpoint(text)
    assert "\n" not in str(raised.value)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.json"))


def test_unreachable_and_not_in_the_cache(server):
    server.close()
    with pytest.raises(
        StorageError, match=r"^org/name is not a folder here, and the Hub at http\S+ cannot be reached to ask"
    ):
        read_checkpoint("org/name")


def test_a_token_opens_what_is_gated_or_private(server, export, monkeypatch):
    server.commit("org/gated", export, gated=True)
    server.commit("org/private", export, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    assert equal(read_checkpoint("org/gated"), read_checkpoint("org/private"))
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(InputError, match=r"^org/private: the Hub does not accept the token: `hf auth login`"):
        read_checkpoint("org/private")


def test_a_full_disk_is_noticed_before(server, export, monkeypatch):
    server.commit("org/name", export)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    with pytest.raises(InputError, match=r"^org/name needs [\d,]+ bytes more, and the disk of .* has only 1,000 left$"):
        read_checkpoint("org/name")
    assert downloads(server) == []


def test_without_the_library_an_id_says_what_to_install(server, monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"org/name does not exist locally, .*pip install 'spatialvla-jax\[hub\]'`$"):
        read_checkpoint("org/name")

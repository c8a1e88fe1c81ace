"""The model card of every export, `convert --push`, and `fetch`. The Hub is a server on loopback."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.checkpoints import equal

pytest.importorskip("huggingface_hub")
from helpers.hub_server import Fault, Hub, hub_server  # noqa: F401
from huggingface_hub import ModelCard, constants

from spatialvla_jax import Policy
from spatialvla_jax.checkpoints import hub, read_checkpoint, write_orbax
from spatialvla_jax.checkpoints.load import fingerprint
from spatialvla_jax.cli import main
from spatialvla_jax.export.card import Origin, export_files, model_card, origin_of
from spatialvla_jax.models import PRESETS
from spatialvla_jax.utils.atomic import write_json


@pytest.fixture
def server(hub_server, monkeypatch) -> Hub:  # noqa: F811
    monkeypatch.setattr(hub, "_known_complete", set())
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    return hub_server


def blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_metadata_are_valid_and_say_the_licence(source):
    card = ModelCard(model_card(source))
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "robotics"
    assert card.data.license == "apache-2.0" and card.data.base_model is None and "spatialvla" in card.data.tags
    large = replace(source, config=replace(PRESETS["spatialvla-4b-224"], spatial_tokens=source.config.spatial_tokens))
    files = export_files(large, Origin("google/paligemma2-3b-pt-224@" + "0" * 40))
    data = ModelCard(files["README.md"]).data
    assert data.license == "gemma" and data.base_model == "google/paligemma2-3b-pt-224"
    assert "ai.google.dev/gemma/terms" in files["NOTICE"] and "ai.google.dev/gemma/terms" in files["README.md"]
    assert "NOTICE" not in export_files(large, Origin("")) and "NOTICE" not in export_files(source)
    assert ModelCard(model_card(source, adapters=True)).data.library_name == "peft"
    assert "/secret/" not in model_card(source, Origin("/secret/base")) and "`base`" in model_card(
        source, Origin("/s/base")
    )


def test_facts_statistics_and_commands(source):
    card = model_card(source)
    grid = source.processor.grid
    assert f"4×4×4×4×4×4 bins, {grid.vocab_size:,} tokens" in card
    row = next(line for line in card.splitlines() if line.startswith("| `toy` |"))
    assert row == "| `toy` | 1 | 3 |" + " 1.5 … 4.5 |" * 7
    assert "## Results" not in card


@pytest.mark.slow
def test_results_are_those_of_these_weights(source, tmp_path):
    """The last validation before the checkpoint, and closed loops of exactly this checkpoint."""
    run = tmp_path / "run"
    write_orbax(run, source)
    step = run / "checkpoints" / "0"
    step.rename(step.with_name("20"))
    write_json(run / "config.json", {"init": "", "data": {"mixture": "oxe"}})
    values = [
        {"step": 10, "val/l1": 0.3},
        {"step": 20, "val/l1": 0.25, "val/accuracy": 0.5},
        {"step": 30, "val/l1": 0.1},
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(value)}\n" for value in values))
    name, rates = fingerprint(run), {"success": 0.5, "standard_error": 0.05, "episodes": 100}
    other = {"success": 0.1, "tasks": {"0": {}, "3": {}}}
    for folder, suite, policy, changed in (
        ("mine", "suite_mine", f"{name}, 224 px", {}),
        ("some", "suite_mine", f"{name}, unconstrained, 224 px", other),
        ("other", "suite_other", "another (12345678), 224 px", {}),
    ):
        (run / folder).mkdir()
        write_json(run / folder / "settings.json", {"policy": policy, "execute": "open_loop"})
        write_json(run / folder / "result.json", {"suites": {suite: rates | changed}})
    origin = origin_of(run, run)
    card = model_card(source, origin)
    assert "step 20) | 0.2500 |" in card and "0.3000" not in card and "0.1000" not in card
    assert "| success in suite_mine (closed loop, 100 episodes, open_loop) | 50.0 ± 5.0 % |" in card
    some = "closed loop, 100 episodes of 2 tasks, open_loop, unconstrained"
    assert f"| success in suite_mine ({some}) | 10.0 ± 5.0 % |" in card and "suite_other" not in card
    assert "| base model | none: randomly initialised |" in card and "| trained on | mixture `oxe` |" in card


def test_push_makes_a_repository_that_loads_as_the_export(server, folder, tmp_path, capsys):
    command = ["convert", str(folder), str(tmp_path / "out"), "--to", "pytorch", "--no-verify"]
    assert main([*command, "--push", "me/policy", "--private"]) == 0
    *_, told, last = capsys.readouterr().out.splitlines()
    repo = server.repos["me/policy"]
    pushed = {name: x for name, x in repo.commits[repo.refs["main"]].items() if name != ".gitattributes"}
    assert pushed == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert repo.private and json.loads(last)["pushed"] == f"me/policy@{repo.refs['main']}"
    assert (
        told == f"pushed me/policy@{repo.refs['main']}; `spatialvla-jax serve --checkpoint me/policy` runs it anywhere"
    )
    assert equal(read_checkpoint("me/policy"), read_checkpoint(tmp_path / "out"))
    assert "Policy.load('me/policy')" in pushed["README.md"].decode()
    assert ModelCard(pushed["README.md"].decode()).data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("arguments", "token", "code", "sentence"),
    {
        "no token": (
            ("--push", "me/policy"),
            None,
            2,
            "--push me/policy needs a token with write permission: `hf auth login`",
        ),
        "reads": (("--push", "me/policy"), "hf_reads", 2, "--push me/policy: the token is read-only"),
        "expired": (("--push", "me/policy"), "hf_old", 2, "me/policy: the Hub does not accept the token"),
        "others": (
            ("--push", "them/policy"),
            "hf_writes",
            2,
            "--push them/policy: the token can write only for me, org",
        ),
        "exists": (
            ("--push", "org/name"),
            "hf_writes",
            2,
            "--push org/name: it exists and holds config.json: choose a",
        ),
        "public": (("--push", "org/new", "--private"), "hf_writes", 2, "--push org/new: it exists and is public, but"),
        "malformed": (
            ("--push", "policy"),
            "hf_writes",
            2,
            "'policy' is not an id of the Hugging Face Hub: expected ORG/NAME",
        ),
        "revision": (("--push", "me/policy@v1"), "hf_writes", 2, "--push me/policy@v1 names a revision"),
        "down": (("--push", "org/down"), "hf_writes", 1, "org/down: the Hub fails (status 503); the same command may"),
        "private": (("--private",), "hf_writes", 2, "--private goes with --push ORG/NAME"),
    }.values(),
)
def test_what_keeps_from_pushing_is_said_before_anything_is_written(
    server, monkeypatch, tmp_path, capsys, arguments, token, code, sentence
):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    server.commit("org/name", {"config.json": b"{}"})
    server.commit("org/new", {".gitattributes": b""})
    server.faults = [Fault("/api/models/org/down", status=503)]
    assert main(["convert", "me/gone", str(tmp_path / "out"), "--to", "pytorch", *arguments]) == code
    assert capsys.readouterr().err.startswith(f"spatialvla-jax convert: {sentence}")
    assert not (tmp_path / "out").exists() and set(server.repos) == {"org/name", "org/new"}


@pytest.mark.slow
def test_an_upload_that_fails_keeps_the_export(server, folder, tmp_path, capsys):
    server.faults = [Fault("/commit/main", status=500)]
    command = ["convert", str(folder), str(tmp_path / "out"), "--to", "pytorch", "--no-verify"]
    assert main([*command, "--push", "me/policy"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(f"{tmp_path / 'out'} is complete, `hf upload me/policy {tmp_path / 'out'}` uploads it")
    assert list(server.repos["me/policy"].commits[server.repos["me/policy"].refs["main"]]) == [".gitattributes"]
    read_checkpoint(tmp_path / "out")


def test_a_commit_whose_response_is_lost_counts(server, folder):
    server.faults = [Fault("/commit/main", cut=5)]
    assert hub.push_export(folder, "me/policy", private=False) == server.repos["me/policy"].refs["main"]


def test_fetch_says_gate_and_size_and_what_is_next(server, folder, capsys, monkeypatch):
    commit = server.commit("IPEC-COMMUNITY/spatialvla-4b-224-pt", folder, gated=True, licence="mit")
    assert main(["fetch", "spatialvla-4b-224-pt"]) == 0
    first, where, then = capsys.readouterr().out.splitlines()
    assert first.startswith(f"IPEC-COMMUNITY/spatialvla-4b-224-pt@{commit[:12]}: licence mit, gated: accept it on http")
    assert re.search(r"; \d+ files, 0\.00 GB, to the cache of the Hub$", first)
    assert where == f"IPEC-COMMUNITY/spatialvla-4b-224-pt is in {hub.find_checkpoint(then.split()[-1])}"
    assert then == "next: spatialvla-jax serve --checkpoint IPEC-COMMUNITY/spatialvla-4b-224-pt"
    monkeypatch.delenv("HF_TOKEN")
    assert main(["fetch", "spatialvla-4b-224-pt", "--to", "there"]) == 2
    assert "is gated: accept its licence on" in capsys.readouterr().err and not list(Path(".").iterdir())


def test_fetch_to_a_folder_goes_on_where_it_broke(server, folder, capsys):
    """The folder appears once it is complete."""
    server.commit("org/name", folder)
    half = (folder / "model.safetensors").stat().st_size // 2
    server.faults = [Fault("GET /blobs/", cut=half), Fault("GET /blobs/", count=9, status=500)]
    assert main(["fetch", "org/name", "--to", "there"]) == 1
    assert not Path("there").exists()
    server.faults = []
    assert main(["fetch", "org/name", "--to", "there"]) == 0
    assert server.requests[-1].endswith(f" bytes={half}-") and [path.name for path in Path(".").iterdir()] == ["there"]
    assert equal(read_checkpoint("there"), read_checkpoint(folder))
    assert not Path(constants.HF_HUB_CACHE).exists()
    assert "next: spatialvla-jax serve --checkpoint there" in capsys.readouterr().out
    assert main(["fetch", "org/name", "--to", "there"]) == 2  # it is there


@pytest.mark.slow
def test_the_lines_of_the_card_run_verbatim(server, folder, monkeypatch):
    """Runs in an export's folder and, with its id, anywhere; JAX and PyTorch choose the same actions."""
    pytest.importorskip("transformers")
    command = ["convert", str(folder), "export", "--to", "pytorch", "--no-verify"]
    assert main([*command, "--push", "me/policy"]) == 0
    card = Path("export/README.md").read_text()
    by_id = [run(block) for block in blocks(card)]
    assert main([*command[:2], "local", *command[3:]]) == 0
    monkeypatch.chdir("local")
    in_folder = [run(block) for block in blocks(Path("README.md").read_text())]
    assert len(by_id) == len(in_folder) == 2
    for names in (*by_id[1:], *in_folder):
        np.testing.assert_allclose(names["actions"], by_id[0]["actions"], atol=1e-5)


def run(block: str) -> dict:
    exec(block, names := {})
    names["actions"] = np.asarray(names["actions"]).reshape(-1, 7)
    return names


@pytest.mark.slow
def test_tokens_by_id_are_those_of_the_local_export(server, folder):
    server.commit("org/name", folder)
    rng = np.random.default_rng(0)
    observation = {
        "image": rng.integers(0, 256, (60, 80, 3), np.uint8),
        "depth": rng.uniform(0.3, 2, (60, 80)).astype(np.float32),
        "prompt": "open the drawer",
    }
    ids = [Policy.load(path).infer(observation)["action_ids"] for path in ("org/name", folder)]
    np.testing.assert_array_equal(*ids)

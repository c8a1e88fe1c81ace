"""The commands that `launch/` would run."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

URL = "gs://bucket/my runs/A_1"
CONFIG = "configs/pretrain.py"
CHECK = (
    'import sys; from spatialvla_jax.utils import storage as s; exit(not s.exists(s.to_path(sys.argv[1]) / "finished"))'
)
GOLDEN = {
    "tpu_vm.sh": (
        ("my-tpu", "us-west4-a"),
        "gcloud compute tpus tpu-vm ssh my-tpu --zone us-west4-a --worker all --command",
        "cd ~/spatialvla_jax && .venv/bin/spatialvla-jax {train} && .venv/bin/python -c {check} {workdir}",
    ),
    "gke_xpk.sh": (
        ("pod", "v5litepod-256", "2", "image:1"),
        "xpk workload create --cluster pod --workload a-1 --tpu-type v5litepod-256 --num-slices 2"
        " --docker-image image:1 --max-restarts 100 --termination-grace-period-seconds 300 --command",
        "spatialvla-jax {train} && python -c {check} {workdir}",
    ),
    "slurm.sbatch": ((), "srun --kill-on-bad-exit=1 .venv/bin/spatialvla-jax {train}", None),
}


def launch(name: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "NAME"}
    return subprocess.run(["bash", f"launch/{name}", *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("workdir", [URL, "/mnt/my runs/A_1"])
@pytest.mark.parametrize("name", GOLDEN)
def test_dry_run_prints_the_command(name: str, workdir: str) -> None:
    places, command, inner = GOLDEN[name]
    quoted = shlex.quote(workdir)
    train = f"train --config {CONFIG} --workdir {quoted} --coordinator auto --config.train.steps=9"
    done = launch(name, "--dry-run", *places, CONFIG, workdir, "--config.train.steps=9")
    words = shlex.split(done.stdout)
    if inner is not None:  # a command line for another shell
        expected = inner.format(train=train, check=shlex.quote(CHECK), workdir=quoted)
        assert shlex.split(words.pop()) == shlex.split(expected)
    assert words == shlex.split(command.format(train=train)) and done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("name", GOLDEN)
def test_too_few_arguments(name: str) -> None:
    done = launch(name, "--dry-run")
    assert done.returncode == 2 and f"launch/{name}" in done.stderr and "CONFIG WORKDIR" in done.stderr


def test_the_run_starts_again_until_it_ends(tmp_path) -> None:
    """With stubs for gcloud, whose run crashes, is preempted and finishes, and for sleep."""
    bin, run = tmp_path / "spatialvla_jax/.venv/bin", tmp_path / "my run"
    bin.mkdir(parents=True)
    run.mkdir()
    (bin / "spatialvla-jax").write_text(
        f"#!/bin/bash\necho x >> {tmp_path}/runs\ncase $(wc -l < {tmp_path}/runs) in\n"
        f"1) exit 134;;\n2) exit 0;;\n*) touch '{run}/finished';;\nesac\n"
    )
    (bin / "spatialvla-jax").chmod(0o755)
    (bin / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (bin / "python").chmod(0o755)
    (tmp_path / "gcloud").write_text(f'#!/bin/bash\nHOME={tmp_path} exec bash -c "${{@: -1}}"\n')
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    for name in ("gcloud", "sleep"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "launch/tpu_vm.sh", "tpu", "zone", "config.py", str(run)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr.count("again in 30 s") == 2
    assert (tmp_path / "runs").read_text().count("x") == 3
    (tmp_path / "gcloud").write_text("#!/bin/bash\nexit 2\n")
    assert subprocess.run(["bash", "launch/tpu_vm.sh", "tpu", "zone", CONFIG, URL], env=environment).returncode == 2


def test_the_image_is_built_from_what_there_is() -> None:
    lines = [line for line in Path("Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    words = [line.split(maxsplit=1) for line in lines]
    assert [word for word, _ in words] == ["FROM", "ARG", "WORKDIR", "COPY", "RUN", "CMD"]
    image, argument, _, _, install, command = (rest for _, rest in words)
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    # A Python release that the package supports, from the registry configured in the user's docker.
    assert (version := re.fullmatch(r"python:3\.(\d+)-slim", image)) and int(version[1]) in (11, 12)
    accelerator = argument.removeprefix("ACCELERATOR=")
    extras = re.search(r"\[(.*)\]", install)[1].replace("$ACCELERATOR", accelerator).split(",")
    assert {*extras, "cuda"} <= project["optional-dependencies"].keys()
    assert json.loads(command)[0] in project["scripts"]

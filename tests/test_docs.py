"""The pages are true of the repository: links lead somewhere, and the parsers accept the commands."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from spatialvla_jax import cli
from spatialvla_jax.cli import make_parser
from spatialvla_jax.config import KEYS, checked, find_config
from spatialvla_jax.utils.schema import check, parse
from spatialvla_jax.utils.shipped import shipped

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "launch/*.md", ".github/**/*.md") for path in ROOT.glob(pattern)
)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^[ \t]*```{language}\n(.*?)^[ \t]*```", page.read_text(), re.M | re.S)


def commands(page: Path) -> Iterator[list[str]]:
    """Every command on a page: those in shell blocks, and inline code that starts like one of our commands."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for span in re.findall(r"`(spatialvla-jax [a-z][^`\n]*|python benchmarks/[^`\n]*)`", text):
        lines.append(span if " -" in span else f"{span} --help")  # a name alone
    pending = ""
    for line in lines:
        pending += re.sub(r"\$\w+", "1", line) + "\n"
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        try:
            read = [*lexer, ";"]
        except ValueError:  # inside a quotation
            continue
        pending, words = "", []
        for word in read:
            if set(word) <= set(";&|"):
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)
    assert not pending, pending


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[ -]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def pages_of_the_site(entry: object) -> Iterator[Path]:
    if isinstance(entry, str):
        yield ROOT / "docs" / entry
    elif isinstance(entry, dict | list):
        for below in entry.values() if isinstance(entry, dict) else entry:
            yield from pages_of_the_site(below)


SITE = set(pages_of_the_site(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = Path(os.path.normpath(page.parent / path)) if path else page
        assert file.exists() or file in SITE, f"{page.name} links to {target}"
        if anchor and file.exists():
            assert anchor in anchors(file), f"{page.name} links to {target}; there are {sorted(anchors(file))}"


@by_page
def test_commands_are_understood(page: Path) -> None:
    for program, *argv in commands(page):
        if program == "spatialvla-jax" and "…" not in argv:
            understand(argv)
        elif program == "python" and argv[0].startswith(("benchmarks/", "examples/")):
            source = (ROOT / argv[0]).read_text()
            flags = [word.partition("=")[0] for word in argv[1:] if word.startswith("--") and word != "--help"]
            assert all(f'"{flag}"' in source for flag in flags), argv
        elif program == "make":
            assert re.search(rf"^([\w-]+ )*{argv[0]}\b.*:", (ROOT / "Makefile").read_text(), re.M), argv
        elif program == "pip":
            project = (ROOT / "pyproject.toml").read_text()
            for extra in re.findall(r"(?:\.|spatialvla-jax)\[([\w,]+)\]", " ".join(argv)):
                assert all(re.search(rf"^{name} = \[", project, re.M) for name in extra.split(",")), argv


def understand(argv: list[str]) -> None:
    """Parse a command and check its config's name, keys and values; words in capitals are the reader's own values."""
    try:
        args, rest = make_parser().parse_known_args(argv[: argv.index("--")] if "--" in argv else argv)
    except SystemExit as stopped:
        assert stopped.code == 0, argv  # --help
        return
    config = getattr(args, "config", None)
    if config and not config.endswith(".py") and not config.isupper():
        assert find_config(config) == shipped(f"configs/{config}.py")
    for key, value in cli.overrides_of(rest, allowed=hasattr(args, "config")).items():
        if key.startswith("data.drop."):
            check(parse(value, KEYS["data.drop"].items), KEYS["data.drop"].items, key)
        elif not value.isupper():
            checked({key: parse(value, KEYS[key])})


@by_page
def test_python_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


def test_readme_fits_on_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_figures_are_those_of_the_files() -> None:
    bucket, torch = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("bucket", "pytorch_h200")
    )
    page = (ROOT / "docs/results/data.md").read_text()
    for name, stream in bucket["streams"].items():
        low, high = stream["per_cpu_second_range"]
        assert f"| {name} | {stream['per_cpu_second']:.0f} ({low:.0f} to {high:.0f}) |" in page
    page = (ROOT / "docs/results/inference.md").read_text().replace("*", "")
    first, later = (run["pytorch"] for run in torch["runs"])
    row = [f"{x['median_ms']:.{digits}f} ms" for x, digits in ((first["loop 1"], 0), (first["graph 1"], 1))]
    assert re.search(rf"\| batch 1 \| {row[0]} .* \| {row[1]} .* \| {later['graph 1']['median_ms']:.1f} ms", page)
    assert all(f"{first[mode]['chunks_per_second']} chunks/s" in page for mode in ("loop 32", "graph 32"))
    infer = json.loads((ROOT / "benchmarks/results/infer_h200.json").read_text())
    for variant in ("bfloat16 1", "draft 1", "int8 1", "bfloat16 32"):
        low, high = infer[variant]["range_ms"]
        assert f"{infer[variant]['median_ms']:.1f} ms ({low:.1f} to {high:.1f})" in page
    page = (ROOT / "docs/results/simulation.md").read_text().replace("*", "")
    for name, row in json.loads((ROOT / "benchmarks/results/quantisation.json").read_text())["results"].items():
        label = {"expert": "nothing", "linear 256": "256 bins a dimension"}.get(name, f"{name} tokens")
        rate = f"{100 * row['success']:.1f} ± {100 * row['standard_error']:.1f} %"
        assert f"| {label} | {rate} | {row['steps']:.1f} |" in page
    rates = {}
    for file in ("libero_spatial_one_gpu.json", "libero_spatial.json"):
        policies = json.loads((ROOT / "benchmarks/results" / file).read_text())
        for name, row in policies["results"].items():
            rate = f"{100 * row['success']:.1f} ± {100 * row['standard_error']:.1f} %"
            tasks = ", ".join(f"{100 * success:.0f}" for success in row["tasks"].values())
            assert f"| {rate} | {tasks} % | {row['steps_of_a_success']} |" in page
            assert f"{100 * row['trainings'][0]['val/target_error']:.2f} cm" in page
            assert all(f"{training['val/l1']:.4f}" in page for training in row["trainings"])
            for stage in (f"train {name}-0", f"evaluate {name}-{len(row['trainings']) - 1}"):
                assert f"| {policies['seconds'][stage]:.0f} |" in page
            rates[file, name] = rate
    for row in json.loads((ROOT / "benchmarks/results/vla_eval.json").read_text())["results"].values():
        rate = f"{100 * row['success']:.1f} ± {100 * row['standard_error']:.1f} %"
        tasks = ", ".join(f"{100 * success:.0f}" for success in row["tasks"].values())
        line = f"| {rate} | {tasks} % | {row['steps_of_a_success']} |"
        assert line in (ROOT / "docs/integrations.md").read_text()
    readme = (ROOT / "README.md").read_text()
    full, rgb = rates["libero_spatial_one_gpu.json", "full"], rates["libero_spatial.json", "rgb"]
    assert f"{full} with the simulator's depth, {rgb} from RGB alone" in readme
    one_gpu = json.loads((ROOT / "benchmarks/results/libero_spatial_one_gpu.json").read_text())
    best, fewer, takeovers = one_gpu["results"]["full"], one_gpu["receding:2"], one_gpu["takeovers"]["rejected"]
    assert f"solves {best['success'] * best['episodes']:.0f} of {best['episodes']} LIBERO-Spatial" in readme
    assert f"{100 * fewer['success']:.1f} ± {100 * fewer['standard_error']:.1f} % of {fewer['episodes']}" in page
    assert f"30 of {30 + takeovers['7']} takeovers there, and 30 of {30 + takeovers['5']} on the ramekin" in page
    page = (ROOT / "docs/results/ablations.md").read_text()
    mini = json.loads((ROOT / "benchmarks/results/mini_ablations_first.json").read_text())
    assert f"{mini['gpu_ms_a_step']} ms of GPU time" in page and f"the {mini['train_frames']:,} frames" in page
    for row in mini["trials"].values():
        right = " | ".join(f"{100 * row['rotation_accuracy'][split]:.0f} %" for split in ("training", "validation"))
        line = f"| {row['teacher_forced_l1']:.4f} | {row['gain_of_last_quarter_percent']:.2f} % | {right} "
        assert f"{line}| {row['successes']} of {row['episodes']} |" in page
    page = (ROOT / "docs/results/training.md").read_text().replace("*", "")
    for run in json.loads((ROOT / "benchmarks/results/two_gpus_h200.json").read_text())["runs"]:
        (low, high), rate = run["step_ms_range"], run["samples_per_second"]
        assert f"| {run['step_ms']:.1f} ms ({low:.1f} to {high:.1f}) | {rate:.1f} |" in page
        assert run["devices"] == 1 or f"| {run['efficiency']:.1%}".replace("%", " %") in page
    for run in json.loads((ROOT / "benchmarks/results/two_gpus_layout_h200.json").read_text())["runs"]:
        low, high = run["step_ms_range"]
        efficiency = "" if run["devices"] == 1 else f"{run['efficiency']:.1%} ".replace("%", " %")
        assert f"| {run['step_ms']:.1f} ms ({low:.1f} to {high:.1f}) | {efficiency}|" in page


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs the extra [docs]")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    build = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    reference = (tmp_path / "site/reference/config/index.html").read_text()
    assert all(f"<code>{key}</code>" in reference for key in KEYS)

"""The page shows every dataset with its instructions and counts, is whole HTML, and the same for the same seed."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.toy_rlds import data_config, make_episodes, make_rlds
from PIL import Image

from spatialvla_jax.actions import fit_gaussians, gaussian_grid, linear_grid
from spatialvla_jax.cli import main
from spatialvla_jax.data import Loader, load_data
from spatialvla_jax.reports.mixture import EPISODES, IMAGE_SIZE, write_page

HOSTILE = "<script>alert('x')</script> & \"quotes\" </figure>"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Text, images and links of a page; fails on tags that do not match."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.texts, self.in_cells, self.tags, self.images, self.paths = [], [], [], [], [], []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())
        self.cells = " ".join(self.in_cells)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.tags.append((tag, attributes))
        if tag == "img":
            self.images.append(base64.b64decode(str(attributes["src"]).removeprefix("data:image/jpeg;base64,")))
        if tag == "path":
            self.paths.append(attributes["d"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)
        if self.open[-1:] == ["td"]:
            self.in_cells.append(data)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """Two datasets: 7 and 4 episodes, the second with a hostile instruction and one without any."""
    folder = tmp_path_factory.mktemp("show")
    hostile = make_episodes(5, seed=3, steps=(1, 4))
    for number, episode in enumerate(hostile):
        for step in episode:
            step["language_instruction"] = "" if number == 4 else HOSTILE
    paths = [make_rlds(folder / "a", {"train": make_episodes(7)}), make_rlds(folder / "b", {"train": hostile})]
    config = data_config(*paths, cache_dir=folder / "cache")
    config["datasets"][1] |= {
        "name": "<b>bold<b>",
        "weight": 0.5,
        "spec": {"robot": "WidowX <i>250</i>", "operations": [["clip_gripper", 0, 1]]},
    }
    config["prompt"]["length"] = 128
    config["drop"] = {"toy0": 0.75}
    return load_data(config, image_size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def page(loader: Loader, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "mixture.html"
    grid = gaussian_grid(fit_gaussians(loader.actions()), (4, 8, 2, 4, 4, 4), 0)
    done = []
    write_page(path, loader, grid, title="toy", progress=lambda *counts: done.append(counts))
    assert done == [(0, 2), (1, 2), (2, 2)]
    assert [p.name for p in path.parent.iterdir()] == ["mixture.html"]
    return Page(path)


def test_every_dataset_instruction_and_count_is_there(page: Page, loader: Loader) -> None:
    assert "toy: training data" in page.text
    for index in loader.indexes():
        assert f" {index.name} " in page.text
        for instruction in index.instructions:
            assert instruction in page.text
    assert f"2 datasets with 11 episodes and {loader.num_frames()} frames" in page.text
    first, second = loader.table()
    for row, counts in ((first, f"7 0 {first['frames']} 1"), (second, f"4 1 {second['frames']} 0.5")):
        early, late = row["shares"]
        assert f"{counts} {early:.2%} {late:.2%} {row['passes']:.2f}" in page.cells
    assert "share in phase 1 share in phase 2" in page.text and second["shares"][1] == 1
    assert "7 of 7 episodes used ·" in page.text and "4 of 5 episodes used (left out: 1 unlabeled)" in page.text
    assert "robot: WidowX <i>250</i> · camera: default · depth: none stored" in page.text
    assert "camera: in the data · depth: in the data" in page.text


def test_hostile_text_stays_text(page: Page) -> None:
    assert not {"script", "i", "link"} & {tag for tag, _ in page.tags} and "<b>bold" not in page.source
    assert page.source.count("alert('x')") == 0 and page.source.count("alert(&#39;x&#39;)") > 1
    assert not re.search(r"(src|href)=(?!\"(data:image/jpeg;|#dataset-))|url\(|@import|http", page.source)


def test_images_are_the_frames(page: Page, loader: Loader) -> None:
    """As many as there should be, in the order of their captions."""
    lengths = [np.diff(index.arrays["episode_end"], prepend=0) for index in loader.indexes()]
    shown = re.findall(r"episode (\d+): (?:all|first, middle and last) of (\d+) frames", page.text)
    assert len(shown) == 2 * EPISODES
    starts, images = np.cumsum([0, *map(sum, lengths)]), iter(page.images)
    for number, (episode, length) in enumerate((int(a), int(b)) for a, b in shown):
        own = lengths[number // EPISODES]
        assert own[episode] == length
        first = starts[number // EPISODES] + own[:episode].sum()
        for step in sorted({0, (length - 1) // 2, length - 1}):
            pixels = np.asarray(Image.open(io.BytesIO(next(images))), float)
            expected = loader.frames(np.asarray([first + step])).image[0].astype(float)
            assert pixels.shape == expected.shape
            assert np.corrcoef(pixels.ravel(), expected.ravel())[0, 1] > 0.8  # noise, so no neighbour looks alike
    assert next(images, None) is None


def test_histograms_lie_over_the_bins(page: Page, loader: Loader) -> None:
    grid = gaussian_grid(fit_gaussians(loader.actions()), (4, 8, 2, 4, 4, 4), 0)
    outlines = [d for d in page.paths if d.endswith("Z")]
    edges = [d for tag, a in page.tags if tag == "path" and a["class"] == "edge" for d in [a["d"]]]
    assert len(outlines) == len(edges) == 3 * 7 + 2  # together and two datasets; two of lengths
    assert [d.count("M") for d in edges[:7]] == [3, 7, 1, 3, 3, 3, 1]
    positions = [float(x) / 224 for x in re.findall(r"M([\d.]+) 0V", edges[1])]
    np.testing.assert_allclose(positions, (np.asarray(grid.phi)[1:-1] + np.pi) / (2 * np.pi), atol=1e-3)
    # The gripper's histogram has bars at both ends only; the share of the closed one is written below.
    heights = [72 - float(y) for y in re.findall(r"V([\d.]+)H", outlines[6])]
    closed = (loader.actions()[:, 6] < 0.5).mean()
    assert {i for i, height in enumerate(heights) if height > 0} == {0, len(heights) - 1}
    assert (heights[0] / heights[-1]) ** 2 == pytest.approx(closed / (1 - closed), rel=0.05)
    assert f"closed {closed:.0%}, open {1 - closed:.0%}" in page.text


def test_same_seed_same_bytes(loader: Loader, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_page(tmp_path / name, loader, linear_grid(), title="toy", seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    text = Page(tmp_path / "a").text
    assert "256 even levels" in text and "θ" not in text


def test_size_is_bounded(loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy images are noise, the worst there is for JPEG: still they keep to what 28 datasets leave for each."""
    from spatialvla_jax.reports import mixture as show

    monkeypatch.setattr(show, "IMAGE_BYTES", 2 * 3_000_000 // 28)
    write_page(tmp_path / "page.html", loader, linear_grid(), title="toy")
    assert (tmp_path / "page.html").stat().st_size * 28 / 2 < 5_000_000


def test_command(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "page.html"
    assert main(["data", "show", "--config", str(config_file), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"wrote {out} (")
    page = Page(out)
    assert "1 dataset with 7 episodes" in page.text and "φ heading around the z axis 15 bins" not in page.text
    assert "φ heading around the z axis 4 bins" in page.text
    assert main(["data", "show", "--config", str(tmp_path / "none.py"), "--out", str(out)]) == 2
    assert "none.py does not exist" in capsys.readouterr().err

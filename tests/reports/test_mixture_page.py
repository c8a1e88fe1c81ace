"""The page lists every dataset's instructions and counts, plays episodes, is valid HTML, and depends only on the
seed."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import browser
from helpers.toy_rlds import data_config, make_episodes, make_rlds
from PIL import Image

from spatialvla_jax.actions import fit_gaussians, gaussian_grid, linear_grid
from spatialvla_jax.cli import main
from spatialvla_jax.data import Loader
from spatialvla_jax.data.stored import stored_depth, stored_state
from spatialvla_jax.reports.mixture import EPISODES, IMAGE_SIZE, PLAYED, write_page
from spatialvla_jax.reports.player import depth_maps

HOSTILE = "<script>alert('x')</script> & \"quotes\" </figure>"
VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """Text, links and episodes of a page; fails on unbalanced tags."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.texts, self.in_cells, self.tags, self.played, self.paths = [], [], [], [], [], []
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
        if tag == "path":
            self.paths.append(attributes["d"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"] and self.tags[-1] == ("script", {"type": "application/json"}):
            self.played.append(json.loads(data))
        elif self.open[-1:] not in (["style"], ["script"]):
            self.texts.append(data)
        if self.open[-1:] == ["td"]:
            self.in_cells.append(data)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """Two datasets of 7 and 4 episodes; the second has a hostile instruction and an episode without any."""
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
    return Loader(config, image_size=IMAGE_SIZE)


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
    assert not {"i", "link"} & {tag for tag, _ in page.tags} and "<b>bold" not in page.source
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json"}] * 2 + [{}]  # two datasets and the player
    assert page.source.count("alert('x')") == 0 and page.source.count("alert(&#39;x&#39;)") > 1
    assert HOSTILE in [episode["instruction"] for episode in page.played[1]["episodes"]]
    assert not re.search(r"(src|href)=(?!\"#dataset-)|url\(|@import|http", page.source)


def picture(source: str, kind: str) -> np.ndarray:
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix(f"data:image/{kind};base64,")))), float
    )


def test_played_episodes_are_those_stored(page: Page, loader: Loader) -> None:
    """Pictures, depth, actions and state belong to the steps that are stated."""
    starts = np.cumsum([0, *(index.num_frames for index in loader.indexes())])
    shown = re.findall(r"episode (\d+): “.*?” \((\d+) of (\d+) frames\)", page.text)
    played = [episode for part in page.played for episode in part["episodes"]]
    assert len(played) == len(shown) == 2 * EPISODES
    total = [sum(int(row[i]) for row in shown) for i in (1, 2)]
    assert f"8 episodes to play, with {total[0]} of their {total[1]} frames" in page.text
    for number, (episode, told) in enumerate(zip(played, shown, strict=True)):
        index = loader.indexes()[number // EPISODES]
        first = int(np.append(0, index.arrays["episode_end"])[episode["episode"]])
        assert told == (str(episode["episode"]), str(len(episode["images"])), str(episode["length"]))
        assert episode["length"] == index.arrays["episode_end"][episode["episode"]] - first
        assert episode["shown"][0] == 1 and episode["shown"][-1] == episode["length"] == episode["steps"][-1]
        frames = first + np.asarray(episode["shown"]) - 1
        batch = loader.frames(starts[number // EPISODES] + frames)
        for source, image in zip(episode["images"], np.asarray(batch.image, float), strict=True):
            pixels = picture(source, "jpeg")
            assert np.corrcoef(pixels.ravel(), image.ravel())[0, 1] > 0.8  # noise, so neighbouring steps differ
        camera = np.asarray(batch.intrinsics)[0, [0, 1, 0, 1], [0, 1, 2, 2]] / IMAGE_SIZE
        np.testing.assert_allclose(episode["camera"], camera, rtol=1e-3)
        steps = first + np.asarray(episode["steps"]) - 1
        np.testing.assert_allclose(np.transpose(episode["action"]), index.arrays["action"][steps], rtol=1e-3)
        name, state = stored_state(index, episode["episode"]) or ("", np.empty(0))
        assert episode["state"]["name"] == name == "observation/state" and episode["state"]["size"] == 8
        np.testing.assert_allclose(np.transpose(episode["state"]["values"]), state[index.step(steps)], rtol=1e-3)
        if number < EPISODES:  # the second dataset has no depth
            near, far = episode["depth"]["near"], episode["depth"]["far"]
            for source, frame in zip(episode["depth"]["maps"], frames.tolist(), strict=True):
                grey, depth = picture(source, "png"), stored_depth(index, frame)
                assert depth is not None and grey.shape == (64, 64)
                rows, columns = (((np.arange(64) + 0.5) * side / 64).astype(int) for side in depth.shape)
                metres = near + (grey - 1) / 254 * (far - near)
                expected = np.clip(depth[rows[:, None], columns], near, far)
                assert np.abs(metres - expected)[grey > 0].max() < 1.01 * (far - near) / 254 / 2 + 1e-3
        else:
            assert episode["depth"] is None


def test_depth_without_end_is_as_far_as_the_farthest_reading() -> None:
    depth = np.array([[1, 2], [np.inf, 0]], np.float32)
    found = depth_maps([depth, np.full((2, 2), np.nan, np.float32)], 1000)
    assert found is not None and (found["near"], found["far"]) == (1.01, 1.99)
    grey, nothing = (picture(source, "png") for source in found["maps"])
    assert grey[0, 0] == 1 and grey[0, -1] == grey[-1, 0] == 255 and grey[-1, -1] == 0 and not nothing.any()


def test_histograms_lie_over_the_bins(page: Page, loader: Loader) -> None:
    grid = gaussian_grid(fit_gaussians(loader.actions()), (4, 8, 2, 4, 4, 4), 0)
    outlines = [d for d in page.paths if d.endswith("Z")]
    edges = [d for tag, a in page.tags if tag == "path" and a["class"] == "edge" for d in [a["d"]]]
    assert len(outlines) == len(edges) == 3 * 7 + 2  # seven for the mixture and each of two datasets; two of lengths
    assert [d.count("M") for d in edges[:7]] == [3, 7, 1, 3, 3, 3, 1]
    positions = [float(x) / 224 for x in re.findall(r"M([\d.]+) 0V", edges[1])]
    np.testing.assert_allclose(positions, (np.asarray(grid.phi)[1:-1] + np.pi) / (2 * np.pi), atol=1e-3)
    # The gripper's histogram has bars only at both ends; the share of closed grippers is written below.
    heights = [72 - float(y) for y in re.findall(r"V([\d.]+)H", outlines[6])]
    # Log scale: from a single action to 100 %.
    decades = np.ceil(np.log10(len(loader.actions())))
    closed = (loader.actions()[:, 6] < 0.5).mean()
    assert {i for i, height in enumerate(heights) if height > 0} == {0, len(heights) - 1}
    for height, share in ((heights[0], closed), (heights[-1], 1 - closed)):
        assert height == pytest.approx(72 * (1 + np.log10(share) / decades), abs=0.06)
    assert "share on a log scale" in page.text and "100 %" in page.text
    assert f"closed {closed:.0%}, open {1 - closed:.0%}" in page.text


def test_same_seed_same_bytes(loader: Loader, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_page(tmp_path / name, loader, linear_grid(), title="toy", seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    text = Page(tmp_path / "a").text
    assert "256 even levels" in text and "θ" not in text


def test_size_is_bounded(loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy images are noise, the worst case for JPEG, yet they fit the limit that 28 datasets leave for each."""
    from spatialvla_jax.reports import mixture as show

    monkeypatch.setattr(show, "IMAGE_BYTES", 2 * show.IMAGE_BYTES // 28)
    write_page(tmp_path / "page.html", loader, linear_grid(), title="toy")
    assert (tmp_path / "page.html").stat().st_size * 28 / 2 < 10_000_000
    monkeypatch.setattr(show, "IMAGE_BYTES", 10_000)
    write_page(tmp_path / "small.html", loader, linear_grid(), title="toy")
    played = [episode for part in Page(tmp_path / "small.html").played for episode in part["episodes"]]
    assert max(len(episode["images"]) for episode in played) == PLAYED[0]


@pytest.mark.slow
def test_the_player_in_a_browser(page: Page, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page.source)
    with browser() as window:
        window.open(f"file://{tmp_path}/page.html")
        window.wait_for("[...document.querySelectorAll('.player')].every((one) => one.dataset.step === '1')")
        assert window.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
        cut = "[...document.querySelectorAll('svg text')].filter((text) => { const [a, b] = [text, text.closest('svg')]"
        cut += (
            ".map((one) => one.getBoundingClientRect()); return a.left < b.left - 1 || a.right > b.right + 1 }).length"
        )
        assert window.evaluate(cut) == 0, "no number is cut off"
        depth = "[...document.querySelectorAll('.player')].map((one) => one.querySelector('canvas').offsetWidth > 0)"
        assert window.evaluate(depth) == [True, False]
        for name in ("depth", "cloud"):
            pixels = f"document.querySelector('.{name}').getContext('2d').getImageData(0, 0, 256, 256).data"
            assert window.evaluate(f"new Set({pixels}).size") > 20, name
        assert window.evaluate("document.querySelectorAll('.player .actions svg').length") == 2 * 7
        assert window.evaluate("document.querySelectorAll('.player .states svg').length") == 2 * 8
        last, first = page.played[0]["episodes"][-1], "document.querySelector('.player')"
        window.evaluate(f"select = {first}.querySelector('select'); select.value = {EPISODES - 1}; select.onchange()")
        window.evaluate(f"{first}.querySelector('button').click()")
        window.wait_for(f"{first}.dataset.step === '{last['length']}'")
        assert window.evaluate(f"{first}.querySelector('img').src") in last["images"]
        assert not window.problems


def test_command(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "page.html"
    assert main(["data", "show", "--config", str(config_file), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"wrote {out} (")
    page = Page(out)
    assert "1 dataset with 7 episodes" in page.text and "φ heading around the z axis 15 bins" not in page.text
    assert "φ heading around the z axis 4 bins" in page.text
    assert main(["data", "show", "--config", str(tmp_path / "none.py"), "--out", str(out)]) == 2
    assert "none.py does not exist" in capsys.readouterr().err

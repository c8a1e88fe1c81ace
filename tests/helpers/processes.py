"""`spatialvla-jax train` in processes that start fast: a server imports everything once and forks for each run."""

import gc
import importlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spatialvla_jax.training.metrics import read_metrics
from spatialvla_jax.utils.storage import AnyPath, is_file


class Server:
    """Forks processes that run the command line and share a compilation cache."""

    def __init__(self, cache: Path) -> None:
        shared = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | shared,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def train(
        self,
        config: Path,
        workdir: AnyPath,
        *arguments: str,
        devices: int = 1,
        file_limit: int = 0,
        errors: Path | None = None,
        pause: tuple[str, int] | None = None,
    ) -> "Run":
        """Start a run on `devices` simulated CPU devices, with a `file_limit` in bytes if not 0. Its output goes to
        `errors`, by default beside its workdir. `pause` says where it stops itself, see `pause_before`."""
        if errors is None:
            assert isinstance(workdir, Path)
            workdir.parent.mkdir(parents=True, exist_ok=True)
            errors = workdir.with_name(f"{workdir.name}.{time.monotonic_ns()}.txt")
        argv = ["train", "--config", str(config), "--workdir", str(workdir), *arguments]
        cloud = {
            key: value for key, value in os.environ.items() if key.startswith(("AWS_", "STORAGE_", "TENSORSTORE_"))
        }
        request = {"argv": argv, "errors": str(errors), "devices": devices, "file_limit": file_limit, "cloud": cloud}
        return Run(self, self.ask(**request, pause=pause), errors)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class Run:
    def __init__(self, server: Server, pid: int, errors: Path) -> None:
        self.server, self.pid, self.errors, self.code = server, pid, errors, None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            status = self.server.ask(poll=self.pid)
            self.code = None if status == -1 else os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = 600) -> int:
        """The exit code."""
        assert not self.until(lambda: False, seconds)
        return self.code  # pyright: ignore[reportReturnType]

    def until(self, moment: Callable[[], bool], seconds: float = 600) -> bool:
        """Wait until `moment()`; False if the run ended before. After `seconds`, the test fails with the run's
        traceback."""
        end = time.monotonic() + seconds
        while not moment():
            if self.poll() is not None:
                return moment()  # it may have been reached, and passed, since the last check
            if time.monotonic() > end:
                self.send(signal.SIGUSR1)
                time.sleep(1)
                self.kill()
                raise AssertionError(f"still running after {seconds} s: {self.errors.read_text()[-8000:]}")
            time.sleep(0.01)
        return True

    def paused(self) -> bool:
        """Whether the process has stopped itself, until SIGCONT."""
        stat = Path(f"/proc/{self.pid}/stat")  # it exists until `poll` has its exit code
        return self.poll() is None and stat.read_text().rpartition(")")[2].split()[0] == "T"

    def send(self, number: int) -> None:
        if self.poll() is None:  # it exists until its exit code is read
            os.kill(self.pid, number)

    def kill(self) -> None:
        while self.poll() is None:
            self.send(signal.SIGKILL)
            time.sleep(0.001)


def child_ends_with(command: Sequence[str], pid: Path, seconds: float = 60) -> bool:
    """Whether the child of `command` ends in time after the command is killed; if not, kill it. The child writes its
    process id to the file `pid`."""
    parent = subprocess.Popen(command)
    try:
        while not (pid.exists() and pid.read_text()):
            assert parent.poll() is None
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
    child, deadline = int(pid.read_text()), time.monotonic() + seconds
    running = Path(f"/proc/{child}/cmdline")
    while running.exists() and running.read_bytes():  # empty: it has not noticed yet that its parent ended
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            return False
        time.sleep(0.1)
    return True


LOGGED = "spatialvla_jax.training.metrics:MetricsLog.write"  # called after each step


def pause_before(name: str, number: int) -> None:
    """Stop this process just before the `number`-th call of MODULE:FUNCTION or MODULE:CLASS.METHOD. A test can then act
    at exactly this moment, however slow the machine is."""
    module, _, place = name.partition(":")
    *outer, last = place.split(".")
    owner = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    call, calls = getattr(owner, last), itertools.count(1)

    def pausing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGSTOP)
        return call(*args, **kwargs)

    setattr(owner, last, pausing)


_kept: list[socket.socket] = []


def free_port() -> int:
    """A port for JAX's coordinator. This process holds it, so nothing else on the machine can get it first."""
    _kept.append(kept := socket.socket())
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # the coordinator sets it too
    kept.bind(("127.0.0.1", 0))
    return kept.getsockname()[1]


def records(workdir: AnyPath) -> list[dict[str, Any]]:
    """The metrics logged so far."""
    path = workdir / "metrics.jsonl"
    return read_metrics(path) if is_file(path) else []


def serve() -> None:
    import faulthandler
    import resource

    import spatialvla_jax.training.loop  # noqa: F401
    from spatialvla_jax.cli import main

    gc.freeze()  # exempts imported objects from the processes' garbage collection
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(status if pid else -1, flush=True)
            running.discard(pid)
            continue
        pid = os.fork()
        if pid == 0:
            file = os.open(request["errors"], os.O_WRONLY | os.O_CREAT)
            null = os.open(os.devnull, os.O_RDWR)
            for target, source in ((0, null), (1, file), (2, file)):
                os.dup2(source, target)
            faulthandler.register(signal.SIGUSR1, all_threads=True)
            os.environ |= request["cloud"]
            os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={request['devices']}"  # the last wins
            if request["file_limit"]:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
            if request["pause"]:
                pause_before(*request["pause"])
            sys.exit(main(request["argv"]))
        running.add(pid)
        print(pid, flush=True)
    for pid in running:  # left by failed tests
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()

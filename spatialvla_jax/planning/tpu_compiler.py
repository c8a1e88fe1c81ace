"""Runs libtpu's compiler up to the point where the program and its memory are final.

Generating machine code after that takes nine tenths of the time, and changes neither the optimised program's
instructions nor its buffers. libtpu has no option to skip it, but it first dumps both to a folder (`xla_dump_to`).
Compilation therefore runs in a separate process, which is killed once they are written.
"""

import multiprocessing
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import jax

from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.process import end_worker_with_parent, process_age

Result = TypeVar("Result")
Progress = Callable[[str], None]

# The compiler's errors for programs that do not fit: memory needed, then memory available.
REFUSALS = (
    r"the total memory required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
)
# A line of libtpu's buffer list: bytes and kind. Buffers outside HBM have a color.
BUFFER = re.compile(r"^allocation \d+: size (\d+), (parameter|output|constant|preallocated-temp)(.*)", re.MULTILINE)


def optimise(lowered: jax.stages.Lowered, folder: Path) -> tuple[str, dict[str, int]]:
    """→ (the optimised HLO's text, a chip's HBM bytes in "arguments", "temporaries" and "outputs").

    Outputs that reuse donated arguments count as arguments. A thread continues to generate machine code, so call this
    by `in_own_process`. Raises jax.errors.JaxRuntimeError if the compiler rejects the program.
    """
    # The last option prints asynchronous instructions as `as_text` does.
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True, "xla_syntax_sugar_async_ops": True}
    compiling: Future[None] = Future()

    def compile_() -> None:
        try:
            lowered.compile(compiler_options=dump)
            compiling.set_result(None)
        except Exception as error:
            compiling.set_exception(error)

    threading.Thread(target=compile_, daemon=True).start()
    while True:
        ended = compiling.done()
        if last := list(folder.glob("*_after_buffer_assignment.txt")):  # written after the two that are read
            break
        if ended:
            compiling.result()
            raise RuntimeError(f"libtpu wrote no program to {folder}")
        wait([compiling], timeout=0.1)
    written = str(last[0]).removesuffix("_after_buffer_assignment.txt")
    return Path(f"{written}.txt").read_text(), buffers_of(Path(f"{written}-buffer-assignment.txt").read_text())


def build(lowered: jax.stages.Lowered) -> tuple[str, dict[str, int]]:
    """`optimise` including machine code: memory is as the executable reports it, with "code" in addition."""
    compiled = lowered.compile()
    hlo, stated = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None and stated is not None
    return hlo, {
        "arguments": stated.argument_size_in_bytes,
        "temporaries": stated.temp_size_in_bytes,
        "outputs": max(0, stated.output_size_in_bytes - stated.alias_size_in_bytes),
        "code": stated.generated_code_size_in_bytes,
    }


def buffers_of(buffers: str) -> dict[str, int]:
    """Bytes of HBM by kind, from libtpu's buffer list."""
    memory = {"arguments": 0, "temporaries": 0, "outputs": 0}
    kinds = {"parameter": "arguments", "output": "outputs"}
    for size, kind, rest in BUFFER.findall(buffers):
        if "color" not in rest:
            memory[kinds.get(kind, "temporaries")] += int(size)
    return memory


def out_of_memory(message: str) -> dict[str, float]:
    """{"used", "hbm"} in bytes, from the compiler's error. Raises InputError if the error has another cause."""
    found = next(filter(None, (re.search(refusal, message) for refusal in REFUSALS)), None)
    if not found:
        reason = message.splitlines()[0][:500]
        raise InputError(f"libtpu cannot compile this plan; another mesh or batch may work: {reason}")
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return {"used": float(found[1]) * unit[found[2]], "hbm": float(found[3]) * unit[found[4]]}


def in_own_process(function: Callable[..., Result], *args: Any, progress: Progress) -> Result:
    """Call `function(*args, progress)` in a new process on CPU devices, which is killed once it has returned.

    Raises the function's InputError, and RuntimeError if the process dies.
    """
    context = multiprocessing.get_context("spawn")
    answers, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, *args), daemon=True)
    # Ctrl-C reaches both processes, and this one handles it: a child inherits ignored signals.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, interrupt)
    theirs.close()
    try:
        while isinstance(answer := answers.recv(), str):
            progress(answer)
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that compiles died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, InputError):
        raise answer
    return answer


def _answer(connection: Connection, function: Callable[..., Any], *args: Any) -> None:
    end_worker_with_parent()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program would leave nothing to read
    connection.send(f"  start: {process_age():.1f} s")
    try:
        connection.send(function(*args, connection.send))
    except InputError as error:
        connection.send(error)

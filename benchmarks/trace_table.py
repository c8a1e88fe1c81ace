"""Breakdown of a jitted step: a profiler trace summed by part of the model and kind of kernel."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np

# First match wins, on the name of the operation: jit(step)/…/llm/layers/attn/….
PARTS = (
    ("depth", r"/zoe/|estimate_depth"),
    ("vision", r"/img/"),
    ("ego3d", r"/ego3d/"),
    ("prompt", r"/prompt/"),
    ("tokens", r"/tokens/"),
    ("attention", r"llm/.*attn/(?!q_einsum|kv_einsum|attn_vec_einsum)"),
    ("lm head", r"llm\.logits|softmax_cross|log_softmax"),
    ("language", r"/llm|spatial_embedding"),
    ("augment", r"augment"),
    ("optimizer", r"adam|clip_by|apply_updates|global_norm|scale_by|jit\(step\)/(jit\(_where\)|reduce_sum)"),
    ("adapters", r"jvp\(\)\)?/(transpose|convert_element_type|dot_general)$"),
    ("loss", r"jvp\(\)|vmap\("),
)
# On the kernel's name.
KINDS = (
    ("collective", r"nccl|all-gather|reduce-scatter|all-reduce"),
    ("matmul", r"gemm|cublas|cutlass|nvjet|triton_gemm|dot_general|custom-call|fmha|dot"),
    ("convolution", r"conv(?!ert)|fprop|wgrad|dgrad"),
    ("copy", r"memcpy|memset|copy|transpose"),
)


def first_match(table: tuple[tuple[str, str], ...], name: str, other: str) -> str:
    return next((label for label, pattern in table if re.search(pattern, name, re.IGNORECASE)), other)


def hidden_by(spans: list[tuple[float, float]], others: list[tuple[float, float]]) -> list[float]:
    """Length of the overlap of each span with the union of `others`."""
    starts, stops = [], []
    for start, stop in sorted(others):
        if stops and start <= stops[-1]:
            stops[-1] = max(stops[-1], stop)
        else:
            starts.append(start)
            stops.append(stop)
    edges = np.array([x for pair in zip(starts, stops, strict=True) for x in pair] or [0.0])
    covered = np.concatenate([[0.0], np.cumsum(np.diff(edges) * (np.arange(len(edges) - 1) % 2 == 0))])
    at = lambda x: np.interp(x, edges, covered)  # noqa: E731
    return [float(at(stop) - at(start)) for start, stop in spans]


class Event(NamedTuple):
    """A kernel or copy in a trace; times in nanoseconds. `op` is its instruction in the compiled program, or ""."""

    start: float
    stop: float
    kernel: str
    op: str


def events_of(run: Callable[[], Any], steps: int) -> list[Event]:
    """Events on the first GPU during `steps` calls of `run`, sorted by start."""
    with TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                out = run()
            jax.block_until_ready(out)
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        lines = (line for plane in data.planes if plane.name.startswith("/device:GPU:0") for line in plane.lines)
        return sorted(
            Event(e.start_ns, e.start_ns + e.duration_ns, e.name, str(dict(e.stats).get("hlo_op", "")))
            for line in lines
            if line.name.startswith("Stream")
            for e in line.events
        )


def names_of(hlo: str) -> dict[str, str]:
    """{instruction: op_name} of a compiled program. A fusion without a name gets that of an instruction in it."""
    names, inside, unnamed, computation = {}, {}, {}, ""
    for line in hlo.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = begins[1]
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            if name := re.search(r'op_name="([^"]*)"', line):
                names[instruction[1]] = inside[computation] = name[1]
            elif calls := re.search(r"calls=%?([\w.\-]+)", line):
                unnamed[instruction[1]] = calls[1]
    return {op: inside[calls] for op, calls in unnamed.items() if calls in inside} | names


def attribute(
    events: Sequence[Event], steps: int, hlo: str, floors: Mapping[str, float] | None = None
) -> tuple[str, dict[str, float]]:
    """Returns (tables to print, milliseconds per step by part). Where events overlap, time counts for the one that
    started first, so that parts and idle time add up to the step. `floors` are in milliseconds per step."""
    names = names_of(hlo)
    total: dict[tuple[str, str], float] = defaultdict(float)
    slowest: dict[tuple[str, str], float] = defaultdict(float)
    kernels: dict[str, list[float]] = defaultdict(list)
    collectives: list[tuple[str, str, float, float]] = []
    computing, part, end, busy = [], "other", 0.0, 0.0
    for event in events:
        path = names.get(event.op, "")
        # Events without a name, such as copies added by the compiler, belong to the part before them.
        part = first_match(PARTS, path, "other") if path else part
        kind = first_match(KINDS, f"{event.kernel} {event.op}", "elementwise")
        alone = max(0.0, event.stop - max(event.start, end))
        total[part, kind] += alone
        busy, end = busy + alone, max(end, event.stop)
        slowest[event.op or event.kernel, path] += event.stop - event.start
        kernels[re.sub(r"[._]\d+$", "", event.kernel)].append(event.stop - event.start)
        if kind == "collective":
            collectives.append((event.op or event.kernel, path, event.start, event.stop))
        else:
            computing.append((event.start, event.stop))
    ms = 1e-6 / steps
    parts = {part: sum(v for (p, _), v in total.items() if p == part) * ms for part, _ in total}
    wall = (end - events[0].start) * ms if events else 0.0
    order = [*sorted(parts, key=lambda p: -parts[p]), "idle"]
    parts["idle"] = wall - busy * ms
    kinds, floors = sorted({kind for _, kind in total}), floors or {}
    rows = [f"{'ms a step':12}" + "".join(f"{kind:>13}" for kind in kinds) + f"{'sum':>9}{'floor':>9}{'ratio':>7}"]
    for part in order:
        cells = "".join(f"{total.get((part, kind), 0) * ms:13.1f}" for kind in kinds)
        floor = f"{floors[part]:9.1f}{parts[part] / floors[part]:7.2f}" if floors.get(part) else ""
        rows.append(f"{part:12}{cells}{parts[part]:9.1f}{floor}")
    least = sum(floors.values())
    rows.append(f"{'step':12}{'':{13 * len(kinds)}}{wall:9.1f}" + (f"{least:9.1f}{wall / least:7.2f}" if least else ""))
    rows.append("slowest operations:")
    for (op, path), ns in sorted(slowest.items(), key=lambda x: -x[1])[:30]:
        rows.append(f"{ns * ms:8.2f}  {op[:40]:40}  {path[-110:]}")
    rows.append("kernels of one name: ms a step, how many, microseconds each")
    for name, each in sorted(kernels.items(), key=lambda x: -sum(x[1]))[:30]:
        rows.append(f"{sum(each) * ms:8.2f} {len(each) / steps:8.0f} {1e-3 * sum(each) / len(each):8.1f}  {name[:110]}")
    parts |= {"step": wall}
    if collectives:
        hidden = hidden_by([(start, stop) for *_, start, stop in collectives], computing)
        by_op: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for (op, path, start, stop), under in zip(collectives, hidden, strict=True):
            for i, value in enumerate((1, stop - start, stop - start - under)):
                by_op[op, path][i] += value
        parts |= {"collectives": sum(x[1] for x in by_op.values()) * ms}
        parts |= {"exposed": sum(x[2] for x in by_op.values()) * ms}
        rows.append(f"collectives: {parts['collectives']:.1f} ms a step, of which {parts['exposed']:.1f} are exposed")
        rows.append(f"{'ms a step':>9} {'exposed':>8} {'how many':>9}")
        for (op, path), (number, total_ns, exposed) in sorted(by_op.items(), key=lambda x: -x[1][2])[:30]:
            rows.append(f"{total_ns * ms:9.2f} {exposed * ms:8.2f} {number / steps:9.0f}  {op[:40]:40}  {path[-100:]}")
    return "\n".join(rows), {part: round(value, 6) for part, value in parts.items()}


def trace(
    run: Callable[[], Any], steps: int, hlo: str, floors: Mapping[str, float] | None = None
) -> tuple[str, dict[str, float]]:
    """`attribute` of `steps` calls of `run`, the jitted program whose compiled text is `hlo`."""
    return attribute(events_of(run, steps), steps, hlo, floors)

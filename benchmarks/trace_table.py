"""Where the time of a jitted step goes: a profiler trace summed by part of the model and kind of kernel."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
    ("optimizer", r"adam|clip_by|apply_updates|global_norm|scale_by"),
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
    """How much of each span lies within the union of `others`, in their unit."""
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


def trace(run: Callable[[], Any], steps: int, hlo: str) -> tuple[str, dict[str, float]]:
    """Trace `steps` calls of `run`; → (a table to print, milliseconds a step by part). `hlo` is the compiled text."""
    names = dict(re.findall(r"%?([\w.\-]+) = .*?metadata=\{.*?op_name=\"([^\"]*)\"", hlo))
    with TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                out = run()
            jax.block_until_ready(out)
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        spans, computing, total = [], [], defaultdict(float)
        slowest: dict[tuple[str, str], float] = defaultdict(float)
        kernels: dict[str, list[float]] = defaultdict(list)
        collectives: list[tuple[str, str, float, float]] = []
        for plane in data.planes:
            if not plane.name.startswith("/device:GPU:0"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = dict(event.stats)
                    op = str(stats.get("hlo_op", ""))
                    path = names.get(op) or str(stats.get("tf_op", "")) or op
                    part = first_match(PARTS, path, "other")
                    kind = first_match(KINDS, f"{event.name} {op}", "elementwise")
                    total[part, kind] += event.duration_ns
                    slowest[op or event.name, path] += event.duration_ns
                    kernels[re.sub(r"[._]\d+$", "", event.name)].append(event.duration_ns)
                    span = (event.start_ns, event.start_ns + event.duration_ns)
                    spans.append(span)
                    if kind == "collective":
                        collectives.append((op or event.name, path, *span))
                    else:
                        computing.append(span)
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    wall = end - min(start for start, _ in spans) if spans else 0.0
    ms = 1e-6 / steps
    kinds = sorted({kind for _, kind in total})
    rows = [f"{'ms a step':12}" + "".join(f"{kind:>13}" for kind in kinds) + f"{'sum':>9}"]
    parts = {part: sum(v for (p, _), v in total.items() if p == part) * ms for part, _ in total}
    for part in sorted(parts, key=lambda p: -parts[p]):
        cells = "".join(f"{total.get((part, kind), 0) * ms:13.1f}" for kind in kinds)
        rows.append(f"{part:12}{cells}{parts[part]:9.1f}")
    parts["idle"] = (wall - busy) * ms
    rows.append(f"{'idle':12}{'':{13 * len(kinds)}}{parts['idle']:9.1f}")
    rows.append("slowest operations:")
    for (op, path), ns in sorted(slowest.items(), key=lambda x: -x[1])[:30]:
        rows.append(f"{ns * ms:8.2f}  {op[:40]:40}  {path[-110:]}")
    rows.append("kernels of one name: ms a step, how many, microseconds each")
    for name, each in sorted(kernels.items(), key=lambda x: -sum(x[1]))[:30]:
        rows.append(f"{sum(each) * ms:8.2f} {len(each) / steps:8.0f} {1e-3 * sum(each) / len(each):8.1f}  {name[:110]}")
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
    return "\n".join(rows), {part: round(value, 2) for part, value in parts.items()}

"""The cost of a compiled TPU program, from its optimised HLO text: FLOPs, HBM traffic and collectives of one chip.

XLA's own `cost_analysis` counts the body of a loop once. Here it is multiplied by the trip count (of scanned layers and
accumulation), read from the loop's condition.

    compute seconds    = hardware FLOPs of a chip (with rematerialisation; at least the model's) / peak FLOP/s
    HBM seconds        = bytes that its instructions read from and write to HBM / HBM bandwidth
    ICI, DCN seconds   = bytes that a chip must receive in collectives / bandwidth of that network
    step ≥ roofline    = the largest of these: perfect overlap, peak rates
    MFU ≤ mfu bound    = model FLOPs / (chips × peak × roofline step), model FLOPs without rematerialisation
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

GB = 1e9
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16}
BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "token": 0, "f8e4m3fn": 8}
ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
# Instructions without traffic of their own: they only rename, or the traffic is that of a computation they call.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
FREE |= {"partition-id", "replica-id", "async-start", "async-update", "opt-barrier"}
ENDINGS = ("send", "recv", "async", "copy", "slice", "dynamic-slice", "custom-call", *COLLECTIVES)
FREE |= {f"{started}-done" for started in ENDINGS}


@dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    shape: str  # as printed: dtype[dims]{layout}, a tuple in parentheses
    operands: tuple[str, ...]
    text: str
    root: bool


@dataclass(frozen=True)
class Collective:
    """One collective instruction, run `count` times per step; a chip receives `bytes` each time. `asynchronous`: it
    overlaps with other instructions, between its start and its done or in the fusion that holds it."""

    kind: str
    dtype: str
    shape: str
    group: int
    across_slices: bool
    bytes: float
    count: int
    where: str
    asynchronous: bool


@dataclass(frozen=True)
class Cost:
    """The cost of one step on one chip."""

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]

    def received(self, across_slices: bool) -> float:
        """Bytes received per step over the network between slices (DCN) or within them (ICI)."""
        return sum(c.bytes * c.count for c in self.collectives if c.across_slices == across_slices)


def read_program(text: str, devices_per_slice: int) -> Cost:
    """The cost of a module, given its `compiled.as_text()`."""
    computations = parse(text)
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    tables = {name: {i.name: i for i in body} for name, (_, body) in computations.items()}
    flops = hbm = 0.0
    collectives: list[Collective] = []
    started = {called_by(i) for _, body in computations.values() for i in body if i.op.endswith("async-start")}
    for name, times in executed(computations, entry):
        channels: set[str] = set()
        for i in computations[name][1]:
            flops += times * flops_of(i, computations, tables, tables[name])
            for j, kind in collectives_in(i, computations):
                # A collective that overlaps with several fusions is printed in each of them.
                channel = re.search(r"channel_id=(\d+)", j.text)
                if channel is None or channel[1] not in channels:
                    channels |= {channel[1]} if channel else set()
                    asynchronous = j is not i or j.op.endswith("-start") or name in started
                    collectives.append(collective(j, kind, times, devices_per_slice, computations, asynchronous))
            if i.op == "recv" and "_xla_megascale_transfer_type" in i.text:
                collectives.append(across_slices(i, times))
            if i.op not in FREE:
                hbm += times * traffic(i, computations, tables[name])
    return Cost(flops, hbm, tuple(collectives))


def parse(text: str) -> dict[str, tuple[bool, list[Instruction]]]:
    """→ {computation: (is the entry, its instructions)}."""
    computations: dict[str, tuple[bool, list[Instruction]]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if line and not line[0].isspace():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                body = []
                computations[head[2]] = (bool(head[1]), body)
        elif found := INSTRUCTION.match(line):
            rest = line[found.end() :]
            shape, rest = split_shape(rest)
            op, _, arguments = rest.partition("(")
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments[: closing(arguments)]))
            body.append(Instruction(found[2], op.strip(), shape, operands, rest, bool(found[1])))
    return computations


def split_shape(text: str) -> tuple[str, str]:
    """Split off the shape at the start; a tuple's shape is in parentheses, which may be nested."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = closing(text[1:]) + 2
    return text[:end], text[end + 1 :]


def closing(text: str) -> int:
    """The index of the parenthesis that closes one opened before `text`."""
    depth = 1
    for at, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return at
    return len(text)


def executed(computations: dict, entry: str) -> Iterator[tuple[str, int]]:
    """Every computation that the entry runs, not looking into fusions, and how often it runs per step."""
    waiting = [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        yield name, times
        for i in computations[name][1]:
            if i.op == "while":
                condition, body = (re.search(rf"{part}=%?([\w.\-]+)", i.text) for part in ("condition", "body"))
                assert condition is not None and body is not None
                waiting.append((body[1], times * trip_count(computations[condition[1]][1])))
            elif i.op in ("call", "conditional") or i.op.endswith("async-start"):
                called = re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", i.text)
                waiting += [(c, times) for c in called]


def trip_count(condition: list[Instruction]) -> int:
    """The trip count of a loop that counts from 0 to a constant, as compiled scans do; 1 for other loops."""
    names, root = with_root(condition)
    bounds = [names[o].text for o in root.operands if o in names and names[o].op == "constant"]
    found = re.match(r"constant\((\d+)\)", bounds[0]) if bounds and "direction=LT" in root.text else None
    return int(found[1]) if found else 1


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """(dtype, dims, whether in HBM) of every array in a printed shape; `S(1)` in a layout means vector memory."""
    return [
        (dtype, tuple(map(int, dims.split(","))) if dims else (), "S(" not in (layout or ""))
        for dtype, dims, layout in ARRAY.findall(shape)
    ]


def size(shape: str, hbm_only: bool = False) -> float:
    """Bytes of all arrays in a printed shape."""
    return sum(prod(d) * BITS.get(t, 32) / 8 for t, d, in_hbm in arrays(shape) if in_hbm or not hbm_only)


def with_root(body: list[Instruction]) -> tuple[dict[str, Instruction], Instruction]:
    """A computation's instructions by name, and its root, which is its result."""
    return {i.name: i for i in body}, next(i for i in body if i.root)


def called_by(i: Instruction) -> str | None:
    """The computation that an instruction calls, if any."""
    found = re.search(r"calls=%?([\w.\-]+)", i.text)
    return found[1] if found else None


def flops_of(i: Instruction, computations: dict, tables: dict, table: dict[str, Instruction]) -> float:
    """FLOPs of the matrix products and convolutions in an instruction; a multiply-add counts 2."""
    if i.op == "fusion":
        inner = called_by(i)
        return sum(flops_of(j, computations, tables, tables[inner]) for j in computations[inner][1]) if inner else 0
    if i.op not in ("convolution", "dot") or len(i.operands) < 2:
        return 0
    (_, out, _), *_ = arrays(i.shape)
    (_, lhs, _), *_ = arrays(table[i.operands[0]].shape)
    if i.op == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text)
        return 2 * prod(out) * prod(lhs[int(d)] for d in dims[1].split(",") if d) if dims else 0
    (_, rhs, _), *_ = arrays(table[i.operands[1]].shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text)
    assert labels is not None
    sizes = re.search(r"window=\{([^}]*)\}", i.text)
    window = {k: v.split("x") for k, v in re.findall(r"(\w+)=([\d_x\-]+)", sizes[1])} if sizes else {}
    spatial = [c for c in labels[3] if c.isdigit()]
    work = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * rhs[labels[2].index("i")]
    if group := re.search(r"batch_group_count=(\d+)", i.text):
        work /= int(group[1])
    for n, c in enumerate(spatial):
        number = lambda key, default: int(window[key][n]) if key in window else default  # noqa: B023, E731
        pad = int(window["pad"][n].split("_")[0]) if "pad" in window else 0
        work *= valid_places(
            lhs[labels[1].index(c)],
            out[labels[3].index(c)],
            number("size", 1),
            pad,
            number("stride", 1),
            number("lhs_dilate", 1),
            number("rhs_dilate", 1),
        )
    return work


def valid_places(n: int, out: int, window: int, pad: int, stride: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Along one dimension, the number of (output, window position) pairs that read an input rather than padding or the
    gaps that dilation inserts."""
    span, starts = (n - 1) * lhs_dilate, np.arange(out) * stride - pad
    at = (starts + k * rhs_dilate for k in range(window))
    return sum(int(((x >= 0) & (x <= span) & (x % lhs_dilate == 0)).sum()) for x in at)


def traffic(i: Instruction, computations: dict, table: dict[str, Instruction]) -> float:
    """Bytes of HBM that an instruction reads and writes. An operand that is only sliced counts with its slice, a result
    that updates an operand in place with the update."""
    inner = called_by(i) if i.op == "fusion" else None
    if inner is None:
        return plain_traffic(i, table)
    body = computations[inner][1]
    names, root = with_root(body)
    shapes = shapes_of(i.shape)
    several = root.op == "tuple" and len(root.operands) == len(shapes)
    results = zip(root.operands, shapes, strict=True) if several else [(root.name, i.shape)]
    total = 0.0
    for name, shape in results:
        if size(shape, hbm_only=True):
            total += written(names[name], names, computations)
    for at, operand in enumerate(i.operands):
        shape = table[operand].shape
        if size(shape, hbm_only=True):
            total += min(size(shape), read(at, body, computations))
    return total


def written(i: Instruction, names: dict[str, Instruction], computations: dict) -> float:
    """Bytes that an instruction in a fusion actually writes: of an update in place only the update, of a parameter that
    is passed through nothing."""
    if i.op == "bitcast":
        return written(names[i.operands[0]], names, computations)
    if i.op == "parameter":
        return 0
    if i.op == "dynamic-update-slice":
        return size(names[i.operands[1]].shape)
    if i.op == "get-tuple-element":
        source = names[i.operands[0]]
        if source.op in ("custom-call", "parameter"):  # a collective in progress
            return 0
        inner, at = called_by(source), int(re.search(r"index=(\d+)", i.text)[1])  # pyright: ignore[reportOptionalSubscript]
        if inner is not None:
            body, root = with_root(computations[inner][1])
            if root.op == "tuple":
                return written(body[root.operands[at]], body, computations)
    if i.op == "fusion" and (inner := called_by(i)):
        body, root = with_root(computations[inner][1])
        return written(root, body, computations) if root.op != "tuple" else size(i.shape)
    return size(i.shape)


def read(parameter: int, body: list[Instruction], computations: dict) -> float:
    """Bytes of a fusion's parameter that its body reads."""
    name = next((j.name for j in body if j.op == "parameter" and j.text.startswith(f"parameter({parameter})")), None)
    total, waiting = 0.0, [name]
    while waiting:
        name = waiting.pop()
        uses = [(j, at) for j in body for at, operand in enumerate(j.operands) if operand == name]
        for j, at in uses:
            if j.op == "bitcast":
                waiting.append(j.name)
            elif j.op in ("dynamic-slice", "slice", "gather"):
                total += size(j.shape) if at == 0 else 0
            elif j.op == "fusion" and (inner := called_by(j)):
                total += read(at, computations[inner][1], computations)
            elif not (j.op in ("tuple", "custom-call") or (j.op == "dynamic-update-slice" and at == 0)):
                total += size(next(k.shape for k in body if k.name == name))
    return total


def plain_traffic(i: Instruction, table: dict[str, Instruction]) -> float:
    def operand(n: int) -> float:
        return size(table[i.operands[n]].shape, hbm_only=True)

    if i.op in ("copy-start", "slice-start", "dynamic-slice-start"):  # between memories: the result holds both ends
        moved = min((size(s) for s in shapes_of(i.shape) if size(s) > 64), default=0)
        return moved * sum("S(" not in s for s in shapes_of(i.shape)[:2])
    if i.op in ("dynamic-slice", "slice", "gather"):
        return 2 * size(i.shape, hbm_only=True)
    if i.op == "dynamic-update-slice":
        return 2 * operand(1)
    if i.op.removesuffix("-start") in COLLECTIVES:
        return sum(operand(n) for n in range(len(i.operands))) + size(i.shape, hbm_only=True) * (
            0.5 if i.op.endswith("-start") else 1
        )
    return size(i.shape, hbm_only=True) + sum(operand(n) for n in range(len(i.operands)))


def shapes_of(shape: str) -> list[str]:
    return [m.group(0) for m in ARRAY.finditer(shape)]


def collectives_in(i: Instruction, computations: dict) -> Iterator[tuple[Instruction, str]]:
    """(instruction, kind) if it is a collective; for a fusion, those of the collectives inside."""
    kind = i.op.removesuffix("-start")
    if kind in COLLECTIVES or (kind == "fusion" and "all-reduce-scatter" in i.text.split("metadata=")[0]):
        yield i, kind
    elif kind == "fusion" and (inner := called_by(i)):
        for j in computations[inner][1]:
            yield from collectives_in(j, computations)


def collective(
    i: Instruction, kind: str, times: int, devices_per_slice: int, computations: dict, asynchronous: bool
) -> Collective:
    """The collective with the minimal traffic of a ring or torus of n devices: (n − 1)/n of the whole array for a
    gather or scatter, twice that for an all-reduce."""
    text, shape = i.text, i.shape
    if kind == "fusion":
        inner, kind = called_by(i), "reduce-scatter"
        body = computations[inner][1] if inner else []
        text, shape = next(((j.text, j.shape) for j in body if j.op == "all-reduce"), (text, shape))
    groups = replica_groups(text)
    n = len(groups[0]) if groups else 2
    if i.op == "all-gather-start":
        shape = "(" + ", ".join(shapes_of(shape)[len(shapes_of(shape)) // 2 :]) + ")"
    whole = size(shape) * (n if kind == "reduce-scatter" and i.op != "fusion" else 1)
    if i.op == "collective-permute-start":
        whole = size(shapes_of(shape)[0])
    factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
    op_name = re.search(r'op_name="([^"]*)"', i.text)
    largest = max(arrays(shape), key=lambda a: prod(a[1]) * BITS.get(a[0], 32), default=("", (), True))
    return Collective(
        kind=kind,
        dtype=largest[0],
        shape="x".join(map(str, largest[1])),
        group=n,
        across_slices=any(len({d // devices_per_slice for d in g}) > 1 for g in groups),
        bytes=whole * factor,
        count=times,
        where=where_of(op_name[1] if op_name else ""),
        asynchronous=asynchronous,
    )


def across_slices(i: Instruction, times: int) -> Collective:
    """A collective between slices. The compiler emits these as pairs of send and recv, with the kind in an
    attribute."""
    dtype, dims, _ = arrays(i.shape)[0]
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.text)
    kind = found[1].lower().replace("_", "-") if found else "transfer"
    targets = re.search(r'_xla_megascale_target="\{([\d,]+)\}', i.text)
    return Collective(
        kind=kind,
        dtype=dtype,
        shape="x".join(map(str, dims)),
        group=len(targets[1].split(",")) if targets else 2,
        across_slices=True,
        bytes=size(shapes_of(i.shape)[0]),
        count=times,
        where="",
        asynchronous=True,
    )


def replica_groups(text: str) -> list[list[int]]:
    """The device numbers of each group, which XLA prints in one of three formats."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text):
        return [[int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = ([int(x) for x in found[k].split(",")] for k in (1, 2))
        ids = np.arange(prod(dims)).reshape(dims)
        if found[3]:
            ids = ids.transpose([int(x) for x in found[3].split(",")])
        return ids.reshape(shape).tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([\d,]*)\)|)[^{]*\{([^}]*)\}", text):
        axes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", found[1])}
        ids = np.arange(prod(axes.values())).reshape(tuple(axes.values()))
        over = [list(axes).index(a) for a in re.findall(r"'(\w+)'", found[3])]
        kept = [n for n in range(len(axes)) if n not in over]
        return ids.transpose(kept + over).reshape(-1, prod([ids.shape[n] for n in over])).tolist()
    return []


def where_of(op_name: str) -> str:
    """The part of the model and the pass that an instruction belongs to, such as "llm backward"."""
    part = next((p for p in ("zoe", "img", "ego3d", "logits", "embed", "llm") if re.search(rf"\b{p}\b", op_name)), "")
    backward = "transpose(" in op_name
    again = "rematted_computation" in op_name
    return " ".join(filter(None, (part or "rest", "again" if again else "backward" if backward else "forward")))

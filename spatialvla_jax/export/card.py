"""The model card: an export's README.md."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from spatialvla_jax.actions.io import describe_grid
from spatialvla_jax.checkpoints.hub import is_hub_id, parse_id
from spatialvla_jax.checkpoints.load import fingerprint
from spatialvla_jax.checkpoints.orbax import step_directory
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.checkpoints.release import release_differences
from spatialvla_jax.checkpoints.types import Checkpoint, read_json
from spatialvla_jax.config import train_config_of
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.presets import PRESETS
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.utils.storage import AnyPath, is_file, is_url, read_text, to_path

DEPTH = {
    "zoedepth": "estimated from the image by the built-in ZoeDepth",
    "dataset": "given with the image, in metres",
    "none": "not used, so there is no Ego3D",
}
DIMENSIONS = ("Δx", "Δy", "Δz", "Δroll", "Δpitch", "Δyaw", "gripper")
# The notice that Gemma's terms require beside weights derived from it.
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
CARD = """\
---
library_name: {library}
pipeline_tag: robotics
license: {licence}
{base_model}tags:
- spatialvla
- vision-language-action
- robotics
- jax
---

# {title}

A vision-language-action model, SpatialVLA ([arXiv 2501.15830](https://arxiv.org/abs/2501.15830)): an image and an
instruction become a chunk of robot actions. Exported by `spatialvla_jax`.

{facts}

{statistics}{results}{usage}{release}## Licences

The Python files are under Apache-2.0. {weights}
"""
JAX = """\
## In JAX

```python
import numpy as np
from spatialvla_jax import Policy  # pip install spatialvla-jax

policy = Policy.load({name!r})
image = np.zeros(({size}, {size}, 3), np.uint8)  # of the camera
observation = {{"image": image, "prompt": "put the bowl on the plate", "unnorm_key": {key!r}}}
{depth}actions = policy.infer(observation)["actions"]
```

"""
JAX_DEPTH = """\
observation["depth"] = np.ones(({size}, {size}), np.float32)  # metres
"""
PYTORCH = """\
## In PyTorch

```python
import numpy as np
import torch
from transformers import AutoModel, AutoProcessor  # transformers 5

{load}{example}```

"""
WHOLE = """\
model = AutoModel.from_pretrained({name!r}, trust_remote_code=True, dtype=torch.float32)
"""
ADAPTERS = """\
from peft import PeftConfig, PeftModel

base = PeftConfig.from_pretrained({name!r}).base_model_name_or_path
model = AutoModel.from_pretrained(base, trust_remote_code=True, dtype=torch.float32)
model = PeftModel.from_pretrained(model, {name!r})
"""
EXAMPLE = """\
processor = AutoProcessor.from_pretrained({name!r}, trust_remote_code=True)
image = np.zeros(({size}, {size}, 3), np.uint8)  # of the camera
inputs = processor(images=image, text="put the bowl on the plate", unnorm_key={key!r}{depth})
actions = processor.decode_actions(model.predict_action(inputs), unnorm_key={key!r})["actions"]
"""
RELEASE = """\
## In the release's own code

The directory also works with the release, the PyTorch code published with SpatialVLA, under transformers 4.47.0:
replace the Python files here by its `action_tokenizer.py`, `configuration_spatialvla.py`, `modeling_gemma2.py`,
`modeling_spatialvla.py` and `processing_spatialvla.py`. {verdict}

Load it there with `torch_dtype=torch.bfloat16`, which the release's `predict_action` needs, and give it one image at a
time: in its ZoeDepth, an image's depth depends on the rest of its batch. Its processor uses a prompt unchanged.
This model was trained on `{template}`, with the instruction in lower case and without spaces around it. That processor
also resizes images bicubically (here: Lanczos, as in training), and its model chooses every token from the whole
vocabulary (here: from those of its kind).

"""


@dataclass(frozen=True)
class Origin:
    """The known provenance of weights. `init` is the run's, or None if it is not recorded."""

    init: str | None = None
    source: str = ""  # an id of the Hub that was converted
    mixture: str = ""
    step: str = ""
    results: Mapping[str, str] = field(default_factory=dict)  # measured, in words

    @property
    def base_model(self) -> str:
        """An id of the Hub, or ""."""
        named = self.source or self.init or ""
        try:
            return parse_id(named)[0] if self.source or "@" in named else ""
        except InputError:
            return ""


def origin_of(source: str | AnyPath, path: AnyPath) -> Origin:
    """A checkpoint's provenance, from its run's own records only. `source` is what the user named, `path` where it was
    found."""
    if is_hub_id(source):
        return Origin(source=str(source))
    if (step := step_directory(path)) is None:
        return Origin()
    try:
        config = train_config_of(step)
    except InputError:
        return Origin()
    results = _validation(step) | _closed_loop(step)
    return Origin(config.init, mixture=config.data.mixture, step=step.name, results=results)


def _validation(step: AnyPath) -> dict[str, str]:
    """The run's last validation before it wrote the checkpoint."""
    log = step.parents[1] / "metrics.jsonl"
    lines = read_text(log).splitlines() if is_file(log) else []
    records = [json.loads(line) for line in lines if '"val/l1"' in line]
    done = [record for record in records if record["step"] <= int(step.name)]
    if not done:
        return {}
    values = {"L1 of normalised actions": "val/l1", "token accuracy": "val/accuracy"}
    last, when = done[-1], f"validation frames, teacher forced, step {done[-1]['step']:,}"
    return {f"{name} ({when})": f"{last[key]:.4f}" for name, key in values.items() if key in last}


def _closed_loop(step: AnyPath) -> dict[str, str]:
    """Success rates of exactly these weights, from results of `evaluate --closed-loop` inside the run's folder."""
    run = step.parents[1]
    if is_url(run):
        return {}
    found, name = {}, ""
    for file in sorted(Path(run).glob("*/result.json")):
        settings = file.with_name("settings.json")
        if not settings.exists():
            continue
        name = name or fingerprint(step)
        how = read_json(settings)
        if (policy := str(how.get("policy", ""))).startswith(name):
            decoded = ", unconstrained" * (", unconstrained" in policy)
            for suite, rates in read_json(file)["suites"].items():
                success, error = (100 * rates[key] for key in ("success", "standard_error"))
                tasks = f" of {len(rates['tasks'])} tasks" if "tasks" in rates else ""
                ran = f"{rates['episodes']} episodes{tasks}, {how.get('execute')}{decoded}"
                what = f"success in {suite} (closed loop, {ran})"
                found[what] = f"{success:.1f} ± {error:.1f} %"
    return found


def from_gemma(config: SpatialVLAConfig, origin: Origin) -> bool:
    """Whether the weights may come from Gemma 2: they have its sizes, and no record of a random start."""
    sizes = [replace(size.llm, vocab_size=config.llm.vocab_size) for size in PRESETS.values() if _published(size)]
    return config.llm in sizes and origin.init != ""


def _published(size: SpatialVLAConfig) -> bool:
    return size.llm.width >= SpatialVLAConfig().llm.width


def export_files(
    checkpoint: Checkpoint, origin: Origin | None = None, name: str = ".", adapters: bool = False
) -> dict[str, str]:
    """{file name: text} of the card and, if the weights derive from Gemma, of the notice that its terms require."""
    notice = {"NOTICE": f"{NOTICE}\n"} if from_gemma(checkpoint.config, origin or Origin()) else {}
    return {"README.md": model_card(checkpoint, origin, name, adapters)} | notice


def model_card(checkpoint: Checkpoint, origin: Origin | None = None, name: str = ".", adapters: bool = False) -> str:
    """README.md of an export: facts about the model, what its run measured, and how to load it in JAX, transformers and
    the release's code.

    `name` is the id on the Hub, or "." for the card's own folder. With `adapters`, the export holds only their weights.
    """
    config, processor, origin = checkpoint.config, checkpoint.processor, origin or Origin()
    keys, size = list(processor.statistics) if processor else [], config.img.image_size
    known = {"name": name, "size": size, "key": keys[0] if keys else None}
    depth = config.depth_source == "dataset"
    torch_depth = f", depth=np.ones(({size}, {size}), np.float32)" if depth else ""
    usage = PYTORCH.format(
        load=(ADAPTERS if adapters else WHOLE).format(name=name),
        example=EXAMPLE.format(**known, depth=torch_depth) if keys else "",
    )
    if keys and not adapters:
        usage = JAX.format(**known, depth=JAX_DEPTH.format(size=size) if depth else "") + usage
    differences = "".join(f"\n- {sentence}" for sentence in release_differences(config, processor))
    release = RELEASE.format(
        verdict=f"There it acts differently:\n{differences}" if differences else "There it acts as here.",
        template=processor.prompt_template if processor else "{instruction}",
    )
    gemma = from_gemma(config, origin)
    weights = (
        f"The weights derive from Gemma: {NOTICE}."
        if gemma
        else "The weights do not derive from Gemma; they are also under Apache-2.0, unless their author says otherwise."
    )
    zoe = " ZoeDepth is under MIT." if config.depth_source == "zoedepth" else ""
    return CARD.format(
        library="peft" if adapters else "transformers",
        licence="gemma" if gemma else "apache-2.0",
        base_model=f"base_model: {origin.base_model}\n" if origin.base_model else "",
        title="SpatialVLA" if name == "." else name.partition("/")[2],
        facts=_table(("", ""), _facts(checkpoint, origin).items()),
        statistics=_statistics(processor) if processor and keys else "",
        results=_results(origin),
        usage=usage if name != "." else usage.replace("```python\n", "```python\n# in this folder\n"),
        release="" if adapters else release,
        weights=weights + zoe,
    )


def _facts(checkpoint: Checkpoint, origin: Origin) -> dict[str, str]:
    config, processor = checkpoint.config, checkpoint.processor
    base = "not recorded"
    if origin.base_model:
        base = f"`{origin.source or origin.init}`"
    elif origin.init is not None:
        base = f"`{to_path(origin.init).name}`, a local checkpoint" if origin.init else "none: randomly initialised"
    facts = {
        "parameters": f"{sum(prod(x.shape) for x in checkpoint.arrays.values()):,}",
        "base model": base,
        "image": f"{config.img.image_size}×{config.img.image_size}",
        "depth": DEPTH[config.depth_source],
        "attention": "causal" if config.mask == "causal" else "both ways in image and prompt, causal in actions",
        "actions predicted at once": f"{config.action_chunk}, of {config.tokens_per_action} tokens each",
    }
    if processor:
        grid = describe_grid(processor.grid)
        bins = "×".join(map(str, grid["bins"]))
        facts["action grid"] = f"{grid['kind']}, {bins} bins, {grid['vocab_size']:,} tokens"
    keys = processor.statistics if processor else ()
    facts["`unnorm_key`"] = ", ".join(f"`{key}`" for key in keys) or "none: there are no statistics of actions"
    training = {"trained on": f"mixture `{origin.mixture}`" if origin.mixture else "", "trained to step": origin.step}
    return facts | {name: text for name, text in training.items() if text}


def _statistics(processor: Processor) -> str:
    """A table of the datasets: sizes, and the range of each dimension that the normalised -1 and 1 stand for."""
    width = len(next(iter(processor.statistics.values()))["action"]["q01"])
    names = DIMENSIONS if width == len(DIMENSIONS) else [f"dimension {i}" for i in range(width)]
    rows = []
    for key, known in processor.statistics.items():
        ends = zip(known["action"]["q01"], known["action"]["q99"], strict=True)
        counts = [_count(known.get(name)) for name in ("num_trajectories", "num_transitions")]
        rows.append((f"`{key}`", *counts, *(f"{low:.3g} … {high:.3g}" for low, high in ends)))
    intro = "Actions are normalised by the 1 % and 99 % quantiles of the data that the model was trained on:\n\n"
    return f"## Data\n\n{intro}{_table(('dataset', 'episodes', 'frames', *names), rows)}\n\n"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _results(origin: Origin) -> str:
    if not origin.results:
        return ""
    return f"## Results\n\nMeasured on these weights:\n\n{_table(('', ''), origin.results.items())}\n\n"


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

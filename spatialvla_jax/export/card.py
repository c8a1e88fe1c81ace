"""The model card: an export's README.md."""

from math import prod

from spatialvla_jax.checkpoints.release import release_differences
from spatialvla_jax.checkpoints.types import Checkpoint

DEPTH = {
    "zoedepth": "estimated from the image by the built-in ZoeDepth",
    "dataset": "given with the image, in metres",
    "none": "not used, so there is no Ego3D",
}
CARD = """\
---
library_name: transformers
pipeline_tag: robotics
tags: [spatialvla, vision-language-action]
---

# SpatialVLA

A vision-language-action model ([arXiv 2501.15830](https://arxiv.org/abs/2501.15830)), exported by `spatialvla_jax`.

| | |
|---|---|
{facts}

```python
import torch
from transformers import AutoModel, AutoProcessor  # transformers 5

model = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
{example}```

## In the release's own code

The directory also suits the release, the PyTorch code that was published with SpatialVLA, under transformers 4.47.0:
put its `action_tokenizer.py`, `configuration_spatialvla.py`, `modeling_gemma2.py`, `modeling_spatialvla.py` and
`processing_spatialvla.py` over the Python files here. {verdict}

Load it there with `torch_dtype=torch.bfloat16`, which the release's `predict_action` needs, and give it one image at a
time: its ZoeDepth lets the images of a batch change each other's depth. Its processor takes a prompt as it is given.
This model was trained on `{template}`, with the instruction in lower case and without spaces around it. That processor
also resizes images bicubically (here: Lanczos, as in training), and its model chooses every token from the whole
vocabulary (here: from those of its kind).
"""
EXAMPLE = """\
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
inputs = processor(images=image, text="put the bowl on the plate", unnorm_key={key!r}{depth})
actions = processor.decode_actions(model.predict_action(inputs), unnorm_key={key!r})["actions"]
"""


def model_card(checkpoint: Checkpoint) -> str:
    """README.md of an export: facts about the model, and how to load it with transformers and the release's code."""
    config, processor = checkpoint.config, checkpoint.processor
    keys = list(processor.statistics) if processor else []
    facts = {
        "parameters": f"{sum(prod(x.shape) for x in checkpoint.arrays.values()):,}",
        "image": f"{config.img.image_size}×{config.img.image_size}",
        "depth": DEPTH[config.depth_source],
        "attention": "causal" if config.mask == "causal" else "bidirectional in image and prompt, causal in actions",
        "actions predicted at once": f"{config.action_chunk}, of {config.tokens_per_action} tokens each",
        "`unnorm_key`": ", ".join(f"`{key}`" for key in keys) or "none: there are no statistics of actions",
    }
    depth = ", depth=depth" if config.depth_source == "dataset" else ""
    differences = "".join(f"\n- {sentence}" for sentence in release_differences(config, processor))
    return CARD.format(
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        example=EXAMPLE.format(key=keys[0], depth=depth) if keys else "",
        verdict=f"There it acts differently:\n{differences}" if differences else "There it acts as here.",
        template=processor.prompt_template if processor else "{instruction}",
    )

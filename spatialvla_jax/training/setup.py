"""Resolves a config once. The training loop, pod planning, the sweeps' checks and the benchmarks all use `TrainSetup`;
none of them reads the config again."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt
from ml_collections import ConfigDict

from spatialvla_jax.actions import ActionTokenizer
from spatialvla_jax.checkpoints.mapping import param_shapes, unflatten
from spatialvla_jax.errors import InputError
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.models.lora import adapter_shapes
from spatialvla_jax.models.spatialvla import TARGET_HEAD
from spatialvla_jax.training.augment import Augmentation
from spatialvla_jax.training.losses import Loss
from spatialvla_jax.training.optimizer import AdamW, Schedule, split_frozen
from spatialvla_jax.training.sharding import check_batch
from spatialvla_jax.training.spikes import SpikePolicy


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters: the kernels whose paths match `targets` change by alpha / rank · B A."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


class Scalars(NamedTuple):
    """Numbers that a compiled step takes as an argument, as it takes the grid: runs that differ only in them share one
    compilation."""

    seed: UInt[Array, ""] | np.uint32
    schedule: Schedule


@dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """`frozen` holds patterns of parameter paths. The fields from `steps` on are those of `config.train`."""

    preset: str  # the name of the model's sizes
    model: SpatialVLA
    adamw: AdamW
    frozen: tuple[str, ...]
    init: str  # the checkpoint that it starts from; "": random parameters
    init_zoedepth: str  # the depth model beside a PaliGemma
    adapt: dict[str, bool]  # keywords of `adapt_checkpoint`
    adapters: Adapters | None
    augmentation: Augmentation | None
    loss: Loss
    mesh: Mesh | None  # None: nothing will run here, as when checking a sweep for other machines
    num_datasets: int  # in the mixture, for metrics per dataset; 0: no such metrics
    seed: int
    steps: int
    batch_size: int
    grad_accum_steps: int
    gather_once: bool
    max_skipped: int
    log_every: int
    eval_every: int
    eval_split: str
    eval_frames: int
    spikes: SpikePolicy

    @property
    def lora_scale(self) -> float:
        """The factor of B A in `merge_adapters`."""
        return self.adapters.alpha / self.adapters.rank if self.adapters else 0.0

    @property
    def scalars(self) -> Scalars:
        return Scalars(np.uint32(self.seed), self.adamw.schedule)

    def with_remat(self, remat: str) -> "TrainSetup":
        return replace(self, model=SpatialVLA(replace(self.model.config, remat=remat)))


def make_setup(
    config: ConfigDict,
    grid: ActionTokenizer,
    mesh: Mesh | None = None,
    *,
    num_datasets: int = 0,
    text_vocab: int = 0,
) -> TrainSetup:
    """Resolve a config. The vocabulary follows `grid` and a tokenizer of `text_vocab` tokens.

    Raises InputError for an invalid value, and for a batch size that the mesh does not divide.
    """
    sizes, optimizer, train, augment = (config[part].to_dict() for part in ("model", "optimizer", "train", "augment"))
    name = sizes.pop("preset")
    model = SpatialVLA(
        preset(
            name,
            text_vocab=max(preset(name).text_vocab, text_vocab),
            spatial_tokens=grid.vocab_size,
            tokens_per_action=grid.tokens_per_action,
            prompt_length=config.data.prompt.length,
            **sizes,
        )
    )
    # Drop patterns for parts that this model does not have.
    has_zoe, has_ego3d = model.config.depth_source == "zoedepth", model.config.depth_source != "none"
    frozen = tuple(p for p in optimizer.pop("frozen") if p != "zoe" or has_zoe)
    adapters = None
    if config.lora.rank:
        adapters = Adapters(
            config.lora.rank, config.lora.alpha, tuple(p for p in config.lora.targets if p != "ego3d" or has_ego3d)
        )
        frozen = (rf"(?!lora/|{TARGET_HEAD}/|spatial_embedding$)", *frozen)  # all but what trains
    if mesh is not None:
        check_batch(train["batch_size"], train["grad_accum_steps"], mesh)
    return TrainSetup(
        preset=name,
        model=model,
        adamw=AdamW(steps=train["steps"], **optimizer),
        frozen=frozen,
        init=config.init,
        init_zoedepth=config.init_zoedepth,
        adapt=config.adapt.to_dict(),
        adapters=adapters,
        loss=Loss(**config.loss.to_dict()),
        augmentation=Augmentation(**augment) if augment.pop("enabled") else None,
        mesh=mesh,
        num_datasets=num_datasets,
        seed=config.seed,
        spikes=SpikePolicy(**train.pop("spikes")),
        **train,
    )


def check_patterns(setup: TrainSetup) -> None:
    """Raises InputError if a pattern of frozen parameters or adapters matches nothing, or if everything is frozen. Only
    paths matter, so the setup may have any grid."""
    shapes = param_shapes(setup.model.config)
    adapters = adapter_shapes(shapes, setup.adapters.rank, setup.adapters.targets) if setup.adapters else {}
    trainable, _ = split_frozen(
        unflatten(shapes | {f"lora/{path}": shape for path, shape in adapters.items()}), setup.frozen
    )
    if not trainable:
        raise InputError("optimizer.frozen leaves nothing to train")

"""Move a checkpoint to another action grid: spatial embedding adaption (paper III-B), also for the LM head."""

from dataclasses import replace

import numpy as np

from spatialvla_jax.actions import ActionGrid, ActionTokenizer, adapt_embeddings, grid_to_dict
from spatialvla_jax.checkpoints.types import Checkpoint, LazyArray
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.storage import AnyPath

TABLE, HEAD, EMBEDDING = "llm/embedder/input_embedding", "llm/lm_head", "spatial_embedding"


def adapt_checkpoint(
    path: str | AnyPath, checkpoint: Checkpoint, grid: ActionTokenizer, *, embedding: bool, head: bool
) -> Checkpoint:
    """Adapt `checkpoint`, read from `path`, to `grid`. Returns it unchanged if it already has that grid.

    `embedding` adapts the spatial table by `adapt_embeddings`, `head` the action rows of the LM head; text rows are
    copied. The release adapts only the table, which suffices if bin counts are equal; without `head`, other bin counts
    are refused. The text table's action rows, which are never looked up, are adapted too.

    Raises InputError for a checkpoint without a grid, for a linear grid, and for a new grid without `embedding`. The
    old table would not fit its centres.
    """
    if checkpoint.processor is None:
        if embedding or head:
            raise InputError(f"{path} has no action grid to adapt from: set adapt.embedding and adapt.head to False")
        return checkpoint
    old = checkpoint.processor.grid
    if grid_to_dict(old) == grid_to_dict(grid):
        return checkpoint
    if not isinstance(old, ActionGrid) or not isinstance(grid, ActionGrid):
        raise InputError(f"{path} and this config have different grids, and a linear one can't be adapted")
    if not embedding:
        raise InputError(
            f"{path} was trained with another action grid than this config's: set adapt.embedding=True to adapt its "
            "spatial table to the new one, or grid.kind=checkpoint to keep the old one"
        )
    if old.num_bins != grid.num_bins and not head:
        raise InputError(
            f"{path} has a grid of {old.num_bins} bins and this config gives {grid.num_bins}: set adapt.head=True to "
            "adapt the LM head too, or grid.num_bins to the same"
        )

    def adapted(array: LazyArray, first: int) -> LazyArray:
        """Replace the rows from `first` on by those for the new grid's ids."""

        def read() -> np.ndarray:
            table = array.read()
            return np.concatenate([table[:first], np.asarray(adapt_embeddings(old, grid, table[first:]))])

        return LazyArray((first + grid.vocab_size, *array.shape[1:]), array.dtype, read)

    config, arrays = checkpoint.config, dict(checkpoint.arrays)
    arrays[EMBEDDING] = adapted(arrays[EMBEDDING], 0)
    if head:
        arrays[HEAD] = adapted(arrays[HEAD], config.action_offset)
    if old.num_bins != grid.num_bins:
        arrays[TABLE] = adapted(arrays[TABLE], config.action_offset)
    llm = replace(config.llm, vocab_size=config.action_offset + grid.vocab_size)
    config = replace(config, spatial_tokens=grid.vocab_size, llm=llm)
    return replace(checkpoint, config=config, arrays=arrays, processor=replace(checkpoint.processor, grid=grid))

"""Image augmentation on the device, inside the jitted step: colour jitter, and a random crop that moves the intrinsics.

Ranges and order are the release's: crop (90 % of the area), brightness (0.2), contrast and saturation (0.8–1.2), then
hue (0.05).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


@dataclass(frozen=True)
class Augmentation:
    """Set `crop_area` to 1 and the others to 0 to disable them; `contrast` and `saturation` are half-widths around 1.

    If `crop_area_max` exceeds `crop_area`, each example draws its own area between the two. A maximum of 1 lets a
    policy trained from scratch see whole images at the scale it will meet at inference.
    """

    crop_area: float = 0.9
    crop_area_max: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05
    move_intrinsics: bool = True


def augment(
    key: PRNGKeyArray,
    image: Float[Array, "B S S 3"],
    depth: Float[Array, "B S S"] | None,
    intrinsics: Float[Array, "B 3 3"],
    config: Augmentation,
) -> tuple[Float[Array, "B S S 3"], Float[Array, "B S S"] | None, Float[Array, "B 3 3"]]:
    """Draw separately for each example. Image in [0, 1]; depth and (unless switched off) intrinsics follow the crop."""
    crop_key, colour_key = jax.random.split(key)
    B, size = image.shape[:2]
    if config.crop_area < 1:
        largest = max(config.crop_area, config.crop_area_max)
        area = jax.random.uniform(jax.random.fold_in(crop_key, 0), (B,), minval=config.crop_area, maxval=largest)
        side = area**0.5 * size
        offset = jax.random.uniform(crop_key, (B, 2)) * (size - side)[:, None]  # (row, column)
        scale = size / side
        image = jnp.clip(crop(image, offset, scale), 0, 1)
        if depth is not None:
            depth = crop(depth[..., None], offset, scale)[..., 0]
        if config.move_intrinsics:
            intrinsics = crop_intrinsics(intrinsics, offset, scale)
    keys = jax.random.split(colour_key, B)
    return jax.vmap(lambda k, x: colour_jitter(k, x, config))(keys, image), depth, intrinsics


def crop(
    image: Float[Array, "B S S C"], offset: Float[Array, "B 2"], scale: Float[Array, " B"]
) -> Float[Array, "B S S C"]:
    """The square of side S / scale at `offset` (row, column), resized bilinearly to S×S."""

    def one(x, at, by):
        return jax.image.scale_and_translate(
            x, x.shape, (0, 1), jnp.stack([by, by]), -at * by, method="linear", antialias=False
        )

    return jax.vmap(one)(image, offset, scale)


def crop_intrinsics(
    intrinsics: Float[Array, "B 3 3"], offset: Float[Array, "B 2"], scale: Float[Array, " B"]
) -> Float[Array, "B 3 3"]:
    """Intrinsics of the image returned by `crop`: pixel (u, v) moves to (u − column, v − row) · scale."""
    B = offset.shape[0]
    move = jnp.zeros((B, 3, 3)).at[:, 0, 0].set(scale).at[:, 1, 1].set(scale).at[:, 2, 2].set(1)
    move = move.at[:, 0, 2].set(-offset[:, 1] * scale).at[:, 1, 2].set(-offset[:, 0] * scale)
    # Written as a sum: a matrix product would run in reduced precision on accelerators.
    return (move[:, :, :, None] * intrinsics[:, None]).sum(axis=2)


def colour_jitter(key: PRNGKeyArray, image: Float[Array, "S S 3"], config: Augmentation) -> Float[Array, "S S 3"]:
    """`adjust_colours` of one image, with each amount drawn uniformly from the config's range."""
    widths = (config.brightness, config.contrast, config.saturation, config.hue)
    return adjust_colours(
        image,
        *(jax.random.uniform(k, minval=-w, maxval=w) for k, w in zip(jax.random.split(key, 4), widths, strict=True)),
    )


def adjust_colours(
    image: Float[Array, "S S 3"],
    brightness: Float[Array, ""],
    contrast: Float[Array, ""],
    saturation: Float[Array, ""],
    hue: Float[Array, ""],
) -> Float[Array, "S S 3"]:
    """Brightness, contrast, saturation and hue, in this order, as defined by tf.image. The image is clipped to [0, 1]
    after each, as in the release. Contrast and saturation are multiplied by 1 + the amount."""
    image = jnp.clip(image + brightness, 0, 1)
    mean = image.mean(axis=(0, 1), keepdims=True)
    image = jnp.clip((image - mean) * (1 + contrast) + mean, 0, 1)
    # Saturation and hue act in HSV, where neither can leave [0, 1].
    h, s, v = rgb_to_hsv(image)
    return hsv_to_rgb((h + hue) % 1.0, jnp.clip(s * (1 + saturation), 0, 1), v)


def rgb_to_hsv(image: Float[Array, "... 3"]) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    r, g, b = (image[..., i] for i in range(3))
    value = image.max(axis=-1)
    chroma = value - image.min(axis=-1)
    safe = jnp.where(chroma > 0, chroma, 1)
    sector = jnp.where(value == r, ((g - b) / safe) % 6, jnp.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = jnp.where(chroma > 0, sector / 6, 0)
    return hue, jnp.where(value > 0, chroma / jnp.where(value > 0, value, 1), 0), value


def hsv_to_rgb(
    hue: Float[Array, "..."], saturation: Float[Array, "..."], value: Float[Array, "..."]
) -> Float[Array, "... 3"]:
    sector = (hue[..., None] * 6 + jnp.array([5.0, 3.0, 1.0])) % 6
    weight = jnp.clip(jnp.minimum(sector, 4 - sector), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * weight)

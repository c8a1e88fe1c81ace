"""HTML pages that need no other file: scripts, style and pictures are inside."""

import base64
import os
import re
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from spatialvla_jax.utils.atomic import write_text


def write_html(path: str | os.PathLike[str], template: str, **values: Any) -> None:
    """Writes a page of `templates/` by rename. Whatever text `values` hold stays text: it is escaped."""
    environment = Environment(
        loader=PackageLoader("spatialvla_jax.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, environment.get_template(template).render(values))


def svg_uri(text: str) -> str:
    """A vector picture as the source of an `<img>`: without what does not show, coordinates to a hundredth."""
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>", "", text, flags=re.S)
    text = re.sub(r' (?:d|x|y)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), text)
    return "data:image/svg+xml," + quote(" ".join(text.split()).replace('"', "'"), safe=" ='/:;,()")


def data_uri(kind: str, image: bytes) -> str:
    """A picture, `kind` being jpeg or png, as the source of an `<img>`."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"

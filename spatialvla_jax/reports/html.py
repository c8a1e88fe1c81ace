"""HTML pages that need no other file: scripts, style and pictures are inside."""

import base64
import os
import re
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from spatialvla_jax.utils.atomic import write_text


def write_html(path: str | os.PathLike[str], template: str, **values: Any) -> None:
    """Writes a page of `templates/` by rename. Text in `values` is escaped."""
    environment = Environment(
        loader=PackageLoader("spatialvla_jax.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, environment.get_template(template).render(values))


def svg_uri(text: str) -> str:
    """An SVG as the source of an `<img>`, without comments and metadata, and with coordinates to two digits."""
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>", "", text, flags=re.S)
    text = re.sub(r' (?:d|x|y)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), text)
    return "data:image/svg+xml," + quote(" ".join(text.split()).replace('"', "'"), safe=" ='/:;,()")


def data_uri(kind: str, image: bytes) -> str:
    """A picture as the source of an `<img>`. `kind` is jpeg or png."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"

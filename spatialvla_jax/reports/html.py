"""HTML pages that need no other file: no script, style and pictures inside."""

import base64
import os
from typing import Any

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


def data_uri(kind: str, image: bytes) -> str:
    """A picture, `kind` being jpeg or png, as the source of an `<img>`."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"

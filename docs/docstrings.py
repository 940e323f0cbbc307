"""Makes Markdown of what docstrings hold beside Google's sections: roles, and examples without a section."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`")
EXAMPLE = re.compile(r"(?:^|(?<=\n\n))(>>> (?:.+\n?)+)")


class Docstrings(Extension):
    """Turns :func:`name` into code, and a bare doctest into a block of code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[1].rstrip()}\n```\n", text)

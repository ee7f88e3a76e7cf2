"""Shows the examples of docstrings as code in the API reference."""

import re

import griffe

# Lines from a prompt to the next empty line.
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.M)


class ExamplesAsCode(griffe.Extension):
    """Fences examples; griffe expects them indented, and Keras does not."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(
                r"```pycon\n\g<0>\n```", obj.docstring.value
            )

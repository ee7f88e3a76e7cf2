"""Shows the examples and lists of docstrings as such in the API reference."""

import re

import griffe

# Lines from a prompt to the next empty line.
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.M)
# A line of text before an item of a list, which needs an empty line between.
BEFORE_ITEM = re.compile(r"^ *[^-\s].*(?<!:)\n(?= +- )", re.M)


class ForMarkdown(griffe.Extension):
    """Fences examples; griffe expects them indented, and Keras does not."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = BEFORE_ITEM.sub(r"\g<0>\n", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", text)

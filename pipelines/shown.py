"""Text from data, such as names and URLs, as a terminal may show it."""

MAX_TEXT = 120
"""Characters of a text that a table shows."""


def printable(text: str) -> str:
    """The text with whatever is not a visible character or a space escaped: controls, marks that turn text around."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text: str) -> str:
    """`printable`, and cut after MAX_TEXT characters."""
    text = printable(text)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."

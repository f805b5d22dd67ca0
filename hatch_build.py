"""The project's description on a package index: the README with links that work away from the checkout.

A package index shows the README alone, so a relative link there leads nowhere. Where `[project.urls]` in
pyproject.toml has a `Source`, links become absolute below it; while there is none, they become plain words.
"""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


def description(text: str, source: str | None) -> str:
    """The README for an index: `[words](page.md)` → `[words](SOURCE/blob/HEAD/page.md)`, or `words (page.md)`."""

    def away(link: re.Match[str]) -> str:
        words, path, anchor = link[1], link[2], link[3] or ""
        if source:
            return f"[{words}]({source.rstrip('/')}/blob/HEAD/{path}{anchor})"
        return path if words == path else f"{words} ({path})"

    return _LINK.sub(away, text)


class Description(MetadataHookInterface):
    """Sets `readme`, which pyproject.toml calls dynamic."""

    def update(self, metadata: dict) -> None:
        """Put the description into the project's table."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        made = description(text, metadata.get("urls", {}).get("Source"))
        metadata["readme"] = {"content-type": "text/markdown", "text": made}

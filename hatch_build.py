"""What the package's metadata takes from one variable, the repository's address: its links, and those of the README.

An index of packages shows README.md alone, so what is relative in it must name the repository.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


def readme(text: str, repository: str, placeholder: str) -> str:
    """README.md with absolute links: of pictures to their bytes, of everything else to the repository's pages."""
    raw = re.sub(r"//github\.com/", "//raw.githubusercontent.com/", repository) + "/main"
    text = text.replace(placeholder, repository)
    text = re.sub(r'(!\[[^\]]*\]\(|<img [^>]*?src=")(?![a-z]+:)', rf"\g<1>{raw}/", text)
    return re.sub(r"(?<=\]\()(?![a-z]+:|#)(?=[^)\s]+\))", f"{repository}/blob/main/", text)


class CustomMetadataHook(MetadataHookInterface):
    """Fills ``readme`` and ``urls``, which pyproject.toml names as dynamic."""

    def update(self, metadata: dict) -> None:
        """Called by hatchling."""
        placeholder = self.config["repository"]
        repository = (os.environ.get("GRPO_JAX_REPOSITORY") or placeholder).rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": readme(text, repository, placeholder),
        }
        metadata["urls"] = {
            "Repository": repository,
            "Documentation": os.environ.get("GRPO_JAX_SITE") or f"{repository}/tree/main/docs",
            "Changelog": f"{repository}/blob/main/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        }

"""What makes a site of pages that are written for GitHub: links out of docs/, links between languages, formulas.

``mkdocs.yml`` names this file; mkdocs calls the functions by their names.
"""

from __future__ import annotations

import html
import logging
import os
import posixpath
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import unescape

from math_core import LatexToMathML

ROOT = Path(__file__).parents[1]
_HATCH = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
PLACEHOLDER = _HATCH["metadata"]["hooks"]["custom"]["repository"]
REPOSITORY = (os.environ.get("GRPO_JAX_REPOSITORY") or PLACEHOLDER).rstrip("/")

_log = logging.getLogger("mkdocs.hooks.grpo_jax")
_CODE = re.compile(r"(^( *)```.*?^\2```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FILE_NAME = re.compile(r"\[[^\]\s]*\.md\]\(([^)\s#]+\.md)\)")
_PICTURE = re.compile(r'(<img [^>]*?src=")([^":]+)(")')
_TWIN = re.compile(r"^\[(?:日本語|English)\]\([^)]*\)(?: · )?", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_CONVERTER = LatexToMathML(continue_on_error=False)
_drawn = {*map(chr, range(0x20, 0x7F)), "√"}
"""Characters of all formulas, and the root, which MathML does not spell."""
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):(?=<code>)")


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Text in which everything but code is changed."""
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [change(text[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def target(link: str, page: str, known: Callable[[str], bool]) -> str:
    """Where a link of a page leads on the site.

    Args:
      link: as it is written, relative, without an anchor: ``../benchmarks/bench.py``.
      page: the page it stands in, below docs/: ``benchmark.ja.md``.
      known: whether a file below docs/ is on the site.
    """
    if re.match(r"[a-z]+:", link):
        return link
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    below = posixpath.relpath(path, "docs")
    if below.startswith("..") or not known(below):
        if not (ROOT / path).exists():
            _log.warning(
                "docs/%s links %s, which is not there", page, link
            )  # an error where the build is strict
        return f"{REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
    # The site finds the page of the reader's language by its English name.
    return link.removesuffix(".ja.md") + ".md" if link.endswith(".ja.md") else link


def to_mathml(formula: re.Match[str]) -> str:
    """A formula that arithmatex found, as MathML, which browsers draw themselves; an unknown command is an error."""
    tex = unescape(formula[3], {"&quot;": '"', "&#39;": "'"}).strip()
    display = formula[1] == "div"
    mathml = _CONVERTER.convert_with_local_state(tex, displaystyle=display)
    _drawn.update(mathml)
    return f'<div class="formula">{mathml}</div>' if display else mathml


def on_config(config: Any) -> Any:
    """The repository's address has one home."""
    config.repo_url = REPOSITORY
    config.repo_name = "/".join(REPOSITORY.split("/")[-2:])
    return config


def on_page_markdown(markdown: str, *, page: Any, files: Any, **_: Any) -> str:
    """Links, before mkdocs checks them."""
    source = page.file.src_uri

    def known(path: str) -> bool:
        return (ROOT / "docs" / path).is_file()

    def title(link: re.Match[str]) -> str:
        path = ROOT / "docs" / posixpath.dirname(source) / link[1]
        heading = (
            re.search(r"^# (.+)", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else None
        )
        return f"[{heading[1]}]({link[1]})" if heading else link[0]

    def links(text: str) -> str:
        text = _FILE_NAME.sub(title, text)  # who reads the site does not know the files
        text = _LINK.sub(lambda link: link[1] + target(link[2], source, known) + link[3], text)
        # mkdocs leaves raw HTML as it is, and a page of the site is a folder.
        return _PICTURE.sub(lambda found: found[1] + _picture(found[2], page, files) + found[3], text)

    return outside_code(_TWIN.sub("", markdown, count=1), links).replace(PLACEHOLDER, REPOSITORY)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas, and Sphinx' roles in docstrings, which are for editors."""
    return _ROLE.sub("", _FORMULA.sub(to_mathml, content))


def on_post_build(*, config: Any) -> None:
    """The font of formulas, of which a system may have none: what is drawn of it, with its rules for large brackets."""
    import ziamath
    from fontTools import subset

    options = subset.Options(flavor="woff", notdef_outline=True, layout_features=["ssty"])
    font = subset.load_font(Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf", options)
    part = subset.Subsetter(options)
    part.populate(text="".join(sorted(_drawn)))
    part.subset(font)
    subset.save_font(font, Path(config.site_dir) / "math.woff", options)


def _picture(path: str, page: Any, files: Any) -> str:
    source = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), html.unescape(path)))
    file = files.get_file_from_path(source)
    if file is None:
        raise FileNotFoundError(f"docs/{page.file.src_uri}: there is no picture {path!r}")
    return file.url_relative_to(page.file)

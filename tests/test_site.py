"""The site's sources: every page in both languages and in the navigation once, links that lead somewhere, all public names in the reference."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import grpo_jax

for name in ("mkdocs", "math_core"):
    pytest.importorskip(name, reason="the site needs the extra [docs]")
slugs = pytest.importorskip("pymdownx.slugs", reason="the site needs the extra [docs]")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TOP = [
    ROOT / name
    for name in ("README.md", "README.ja.md", "CONTRIBUTING.md", "CONTRIBUTING.ja.md", "SECURITY.md")
]
CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
PLACEHOLDER = "https://github.com/OWNER/grpo-jax"


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without what only mkdocs can make of its tags."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: None)


def module(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


hooks = module("website/hooks.py")


def config() -> dict:
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)


def leaves(nav: list | str):
    for item in nav if isinstance(nav, list) else []:
        for title, below in item.items():
            yield (title, below if isinstance(below, str) else None)
            yield from leaves(below)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    slug = slugs.slugify(case="lower")
    headings = re.findall(
        r"^#+ +(.+?)\s*$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings)
    return {slug(heading, "-") for heading in plain} | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def test_the_navigation_names_every_page_once():
    named = sorted(page for _, page in leaves(config()["nav"]) if page)
    assert named == sorted(str(page.relative_to(DOCS)) for page in PAGES if not page.name.endswith(".ja.md"))


def test_every_title_of_the_navigation_is_translated():
    (languages,) = (plugin["i18n"]["languages"] for plugin in config()["plugins"] if "i18n" in plugin)
    translated = languages[1]["nav_translations"]
    titles = {title for title, _ in leaves(config()["nav"])}
    assert titles - set(translated) == {"Gymnasium", "grpo_jax", "sb3_bridge"} and set(translated) <= titles


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name != "results"], ids=lambda page: page.name
)
def test_every_page_is_there_in_both_languages_and_links_the_other(page):
    name = page.name
    other = name.replace(".ja.md", ".md") if name.endswith(".ja.md") else name.replace(".md", ".ja.md")
    assert page.with_name(other).exists()
    assert re.search(
        rf"\[(English|日本語)\]\({re.escape(other)}\)", "\n".join(page.read_text("utf-8").splitlines()[:5])
    )


@pytest.mark.parametrize("page", [*TOP, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("`code`", text)) + re.findall(
        r'(?:src|href)="([^"]+)"', CODE.sub("", text)
    )
    for link in links:
        if re.match("[a-z]+:", link):
            assert "://github.com/OWNER" not in link or link.startswith(PLACEHOLDER)
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), link
        if not path or page in TOP:
            continue
        # On the site, too: below docs/ as a page, all else in the repository.
        led = hooks.target(path, str(page.relative_to(DOCS)), lambda known: (DOCS / known).is_file())
        inside = target.resolve().is_relative_to(DOCS) and target.is_file()
        assert (page.parent / led).exists() if inside else led.startswith(PLACEHOLDER), (link, led)


@pytest.mark.parametrize(
    ("link", "led"),
    [
        ("dynamics.md", "dynamics.md"),
        ("dynamics.ja.md", "dynamics.md"),
        ("results/images/bench_aggregate.png", "results/images/bench_aggregate.png"),
        ("../grpo_jax/presets.toml", f"{PLACEHOLDER}/blob/main/grpo_jax/presets.toml"),
        ("../benchmarks", f"{PLACEHOLDER}/tree/main/benchmarks"),
        ("https://arxiv.org/abs/2402.03300", "https://arxiv.org/abs/2402.03300"),
    ],
)
def test_links_on_the_site(link, led):
    assert hooks.target(link, "benchmark.ja.md", lambda known: (DOCS / known).is_file()) == led


def test_links_that_lead_nowhere_stop_a_strict_build(caplog):
    hooks.target("../benchmarks/nothing.py", "benchmark.md", lambda known: False)
    assert "docs/benchmark.md links ../benchmarks/nothing.py" in caplog.text


def test_code_is_left_as_it_is():
    text = "[a](x.ja.md) `[b](x.ja.md)`\n```py\n[c](x.ja.md)\n```\n[d](x.ja.md)"
    changed = hooks.outside_code(text, lambda part: part.replace("x.ja.md", "y"))
    assert changed == "[a](y) `[b](x.ja.md)`\n```py\n[c](x.ja.md)\n```\n[d](y)"


def test_a_page_loses_its_language_link_and_names_pages_by_their_titles():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="gymnasium.md"))
    text = "[日本語](gymnasium.ja.md) · see [dynamics.md](dynamics.md), [how](dynamics.md), `[dynamics.md](dynamics.md)`"
    (title,) = re.findall("^# (.+)", (DOCS / "dynamics.md").read_text(encoding="utf-8"))
    changed = hooks.on_page_markdown(text, page=page, files=None)
    assert changed == f"see [{title}](dynamics.md), [how](dynamics.md), `[dynamics.md](dynamics.md)`"


def test_formulas_become_mathml():
    inline = hooks.on_page_content(r'<span class="arithmatex">\(\hat{A}_i &lt; 1\)</span>')
    assert inline.startswith("<math>") and "<mo>&lt;</mo>" in inline and "arithmatex" not in inline
    block = hooks.on_page_content(
        r'<div class="arithmatex">\[\begin{aligned} \pi &amp;= 1 \\ b &amp;= 2 \end{aligned}\]</div>'
    )
    assert 'display="block"' in block and "<mi>π</mi>" in block and block.count("<mtr>") == 2
    with pytest.raises(Exception, match="nosuchcommand"):
        hooks.on_page_content(r'<span class="arithmatex">\(\nosuchcommand x\)</span>')


@pytest.mark.parametrize("language", ["", ".ja"])
def test_the_reference_has_every_public_name_once(language):
    pytest.importorskip("stable_baselines3")
    import sb3_bridge

    pages = [DOCS / "reference" / f"{name}{language}.md" for name in ("grpo_jax", "stages", "sb3_bridge")]
    named = re.findall(
        r"^::: (\S+)$", "\n".join(page.read_text(encoding="utf-8") for page in pages), re.MULTILINE
    )
    public = [f"{one.__name__}.{name}" for one in (grpo_jax, sb3_bridge) for name in one.__all__]
    assert sorted(named) == sorted(name for name in public if not name.endswith("__version__"))


def test_the_home_page_shows_the_readme_s_first_program():
    for language in ("", ".ja"):
        readme, home = (
            path.read_text(encoding="utf-8")
            for path in (ROOT / f"README{language}.md", DOCS / f"index{language}.md")
        )
        (shown,) = re.findall(r"```py\n(.*?)```", home, re.DOTALL)
        assert f"```python\n{shown}```" in readme


def test_the_readme_of_the_package_links_the_repository():
    pytest.importorskip("hatchling", reason="a build needs the extra [dev]")
    readme = module("hatch_build.py").readme
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = readme(text, "https://github.com/someone/fork", PLACEHOLDER)
    targets = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", changed)) + re.findall(r'src="([^"]+)"', changed)
    assert targets and all(re.match("https://|#", target) for target in targets) and "OWNER/" not in changed
    assert "(https://raw.githubusercontent.com/someone/fork/main/docs/images/group.png)" in changed
    assert "(https://github.com/someone/fork/blob/main/README.ja.md)" in changed


def test_versions_and_the_address_agree():
    """The address has one home; the files that cannot read it name the same placeholder."""
    assert hooks.PLACEHOLDER == PLACEHOLDER
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == grpo_jax.__version__ and citation["repository-code"] == PLACEHOLDER
    released = re.search(
        r"^## ([0-9.]+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert released.groups() == (citation["version"], citation["date-released"])


def test_licences_of_all_direct_dependencies_are_listed():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    page = (DOCS / "reference" / "licences.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\S+) \| ([^|]+?) \|", page, re.MULTILINE))
    listed = {re.sub(r"[-_.]+", "-", name).lower() for name in rows}
    named = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", one)[0]).lower() for one in wanted} - {"grpo-jax"}
    assert named - listed == set()
    # What needs a look by a person, and had it.
    looked_at = {"ale-py", "docutils", "pgx", "pylint"}
    assert {
        name for name, said in rows.items() if said == "not said" or re.search(r"\bA?GPL", said)
    } == looked_at

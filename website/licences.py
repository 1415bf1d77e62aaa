"""The licences of all that grpo-jax can pull in, from the packages' own metadata: writes docs/reference/licences.md and its twin.

``python website/licences.py``: pip resolves each extra with the pinned versions and installs nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SUITES = "brax,craftax,jumanji,navix,pgx,playground,xminigrid"
GROUPS = {
    "": "grpo-jax",
    "sb3,render": "[sb3]",
    SUITES: "suites",
    "cuda": "[cuda]",
    "dev,docs": "[dev], [docs]",
}
"""Extras, and what the page calls them; a package is listed under the first that needs it."""

# From what packages call their licences to SPDX names; the first that matches a part of the text.
SPDX = {
    r"GNU Lesser|\bLGPL": "LGPL",
    r"Mozilla|MPL": "MPL-2.0",
    r"Apache": "Apache-2.0",
    r"BSD": "BSD",
    r"ISC": "ISC",
    r"MIT": "MIT",
    r"Python Software Foundation|PSF": "PSF-2.0",
    r"[Zz]lib": "Zlib",
    r"NVIDIA|Proprietary": "NVIDIA's own",  # LicenseRef-NVIDIA-Proprietary, too
    r"Unlicense|Public Domain": "public domain",
    r"GNU General|GPL": "GPL",
}
NOT_SAID = {"pgx": "Apache-2.0; its MinAtar games: GPL-3.0"}
"""Packages whose metadata names no licence: what their LICENSE files say."""

TEXT = {
    "": (
        "Licences",
        "[日本語](licences.ja.md)",
        "grpo-jax has the MIT licence. Below is what its dependencies say of themselves, at the versions that `requirements.txt` and\n"
        "`requirements-suites.txt` pin. The page is written by `website/licences.py`; the third column says what asks for a package first:",
        "Nothing of these packages is copied into grpo-jax: wheels and source archives hold this repository's files alone, so each package keeps its own\n"
        "licence, and all of them go together with MIT code that imports them. Three kinds ask for more than a notice. LGPL and MPL ask it of changes to\n"
        "those packages themselves. GPL holds for programs that are passed on together with such a package: `ale-py` is imported by tests and benchmarks alone,\n"
        "`pylint` is a dependency of Navix that nothing imports, and the MinAtar games of Pgx run only where you ask for `pgx/minatar-...`. NVIDIA's libraries have terms of their own, and come only with `[cuda]`.",
        "| package | licence | asked for by |",
    ),
    ".ja": (
        "ライセンス",
        "[English](licences.md)",
        "grpo-jax のライセンスは MIT です。次の表は、依存パッケージが自身のメタデータに記しているライセンスを、`requirements.txt` と `requirements-suites.txt` で\n"
        "固定した版について並べたものです。表は `website/licences.py` で作ります。3 列目は、そのパッケージを最初に必要とするものです。",
        "これらのパッケージは grpo-jax に複製されていません。wheel とソースアーカイブに入るのは、このリポジトリのファイルだけです。そのため各パッケージは自身のライセンスのまま\n"
        "で、それらを import する MIT のコードと両立します。表示以上のことを求めるものは三種類あります。LGPL と MPL は、そのパッケージ自体を変更した場合に条件を課します。GPL は、\n"
        "一緒に配布するプログラムに及びます。`ale-py` を import するのはテストとベンチマークだけで、`pylint` は Navix の依存ですが、どこからも import されません。Pgx の MinAtar は、\n"
        "`pgx/minatar-...` を指定したときだけ動きます。NVIDIA のライブラリには独自の条件があり、`[cuda]` でだけ入ります。",
        "| パッケージ | ライセンス | 必要とするもの |",
    ),
}


def licence(metadata: dict[str, Any]) -> str:
    """The licence of a package, as SPDX names it, out of the fields of its metadata."""
    if (expression := str(metadata.get("license_expression") or "")) and "LicenseRef" not in expression:
        return expression
    said = [c.split(" :: ")[-1] for c in metadata.get("classifier", []) if c.startswith("License ::")]
    said = [name for name in said if name not in ("OSI Approved", "DFSG approved")]
    said = said or (expression or metadata.get("license", "")).strip().splitlines()[:1]
    found = {next((spdx for like, spdx in SPDX.items() if re.search(like, name)), "") for name in said} - {""}
    return " OR ".join(sorted(found)) or NOT_SAID.get(metadata["name"].lower(), "not said")


def needed(extras: str) -> dict[str, str]:
    """Package -> licence of all that ``grpo-jax[extras]`` pulls in, by its resolver; nothing is installed."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        pins = [f"--constraint={ROOT / name}" for name in ("requirements.txt", "requirements-suites.txt")]
        command = ["install", "-qq", "--dry-run", "--ignore-installed", "--report", report.name, *pins]
        subprocess.run(
            [sys.executable, "-m", "pip", *command, str(ROOT) + (f"[{extras}]" if extras else "")], check=True
        )
        items = json.loads(Path(report.name).read_text())["install"]
    return {one["metadata"]["name"]: licence(one["metadata"]) for one in items}


def main() -> None:
    """Writes both pages."""
    rows: dict[str, tuple[str, str]] = {}
    for extras, group in GROUPS.items():
        rows = {name: (said, group) for name, said in needed(extras).items()} | rows
    rows.pop("grpo-jax")
    order = list(GROUPS.values())
    lines = sorted(rows, key=lambda name: (order.index(rows[name][1]), name.lower()))
    for language, (title, twin, before, after, head) in TEXT.items():
        table = [head, "|---|---|---|", *(f"| {name} | {' | '.join(rows[name])} |" for name in lines)]
        page = [f"# {title}", twin, before, after, "\n".join(table)]
        (ROOT / "docs" / "reference" / f"licences{language}.md").write_text(
            "\n\n".join(page) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()

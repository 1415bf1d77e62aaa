"""Report of the benchmark: Markdown tables and plots from the rows that ``bench.py`` left.

    python benchmarks/report.py runs/bench [--out docs/results] [--pages README.md README.ja.md docs/benchmark*.md]

Writes ``<out>/benchmark_table.md`` and ``<out>/images/bench_*.png``. The numbers are made in ``scores.py``, the tables in
``sections.py``, the plots in ``plots.py``. What the environments allow is in ``references.toml``.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

import plots
import sections
from scores import (
    OURS,
    References,
    Row,
    at_best_settings,
    compare,
    environments_of,
    one_row_a_seed,
    players,
    read,
    read_references,
    select,
)


def refresh(page: str, rows: Sequence[Row], references: References) -> str:
    """A page with the lines of its ``sections.HEAD`` tables written anew, where ours has rows."""
    found = {env for env in environments_of(rows, references) if select(rows, OURS, env)}

    def line(old: str) -> str:
        cells = old.strip("| ").split(" | ")
        ours = len(cells) == len(sections.HEAD) and cells[0] in found
        return sections.summary(cells[0], rows, references) if ours else old

    return "\n".join(map(line, page.split("\n")))


def write(rows: Sequence[Row], references: References, out: pathlib.Path) -> str:
    """Writes the Markdown and the pictures; returns the Markdown.

    Raises:
      SystemExit: no rows.
    """
    if not rows:
        raise SystemExit("no rows: run benchmarks/bench.py first")
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    shown = at_best_settings(players(rows))
    seeds = one_row_a_seed(shown)
    curves = [
        f"![Return against {label}, page {i}](images/{page.name})"
        for name, (label, _) in plots.AXES.items()
        for i, page in enumerate(plots.draw_curves(name, seeds, references, images), start=1)
    ]
    comparisons = compare(seeds, references)
    aggregate = sections.aggregate_section(seeds, references)
    if comparisons:
        plots.draw_aggregate(comparisons, images / "bench_aggregate.png")
        aggregate += "\n![Interquartile means](images/bench_aggregate.png)\n"
    report = "\n".join(
        [
            "<!-- Written by benchmarks/report.py: change that, not this. -->\n",
            sections.summary_section(seeds, references),
            sections.scores_section(seeds, references),
            sections.equal_section(seeds, references),
            sections.time_section(shown, references),
            "## Curves\n\nInterquartile mean and bootstrap 95% interval of five seeds and more; of fewer the median, lowest"
            " and highest. First against decision steps, then against all steps of the environment, those in branches and"
            " searches as well, then against seconds. A logarithmic x axis where the libraries' ranges differ by more than four"
            " times. Compiling that cannot be told apart from training (see the costs) is in both plots over time.\n\n"
            + "\n\n".join(curves)
            + "\n",
            aggregate,
            sections.costs_section(seeds, references),
            sections.missing_section(seeds),
            sections.notes_section(seeds, references),
            sections.provenance_section(shown, len(players(rows)) - len(shown)),
        ]
    )
    (out / "benchmark_table.md").write_text(report)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=pathlib.Path, help="folder that holds rows/*.json")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"))
    parser.add_argument(
        "--pages", type=pathlib.Path, nargs="*", default=[], help="Markdown to refresh with it"
    )
    arguments = parser.parse_args()
    rows, references = read(arguments.runs), read_references()
    write(rows, references, arguments.out)
    seeds = one_row_a_seed(at_best_settings(players(rows)))
    for page in arguments.pages:
        page.write_text(refresh(page.read_text(), seeds, references))
    print(f"{arguments.out / 'benchmark_table.md'} and {arguments.out / 'images'}/bench_*.png")


if __name__ == "__main__":
    main()

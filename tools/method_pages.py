# SPDX-License-Identifier: Apache-2.0
"""Write the generated part of docs/methods/*.md, what the registry knows of each method, or check that it is current.

    python tools/method_pages.py            rewrite it
    python tools/method_pages.py --check    exit 1, naming the pages, where it is not current

A page is prose around a block between the two markers; a method without a page gets one with the block alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_merge.methods.registry import COSTS, MethodSpec, list_methods

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "methods"
NOT_EXACT = "- **not a merge of ΔW**: A and B are merged apart; every report of such a merge says so"
BEGIN, END = "<!-- generated: tools/method_pages.py -->", "<!-- end of generated -->"


def block(spec: MethodSpec) -> str:
    """The generated part: facts and the table of parameters, between its markers."""
    spaces = [f"`{space}`" + (" (default)" if space == spec.default_space else "") for space in spec.spaces]
    exact = [f"`{space}`" for space in spec.spaces if spec.low_rank(space) and space != "factors"]
    cut = [f"`{space}`" for space in spec.spaces if not spec.low_rank(space)]
    rank = [f"at most Σ r_i in {', '.join(exact)}"] if exact else []
    rank += [] if spec.exact else ["that of the adapters (`target_rank` where the method has it)"]
    rank += [f"full in {', '.join(cut)}, cut to the recipe's `rank`"] if cut else []
    work = "; ".join(f"{COSTS[spec.cost_class(space)]} in `{space}`" for space in spec.spaces)
    lines = [
        BEGIN,
        f"> {spec.summary}",
        "",
        f"- spaces: {', '.join(spaces)}",
        f"- rank of the result: {'; '.join(rank)}",
        f"- works on: {work}{', in steps' if spec.iterative else ''}",
        f"- order of the adapters: {'matters' if spec.ordered else 'does not matter'}",
        f"- reference: [{spec.reference}]({link(spec.reference)})",
        f"- version {spec.version}",
        *([] if spec.exact else [NOT_EXACT]),
        "",
        "| parameter | of | default | allowed |",
        "|---|---|---|---|",
    ]
    for parameter in spec.parameters:
        owner = "adapter, module" if parameter.per_adapter else "recipe"
        owner = "recipe, module" if parameter.name == "lambda" else owner
        default = str(parameter.default).lower() if isinstance(parameter.default, bool) else str(parameter.default)
        lines.append(f"| `{parameter.name}` | {owner} | {default} | {parameter.allowed} |")
    return "\n".join([*lines, END])


def link(reference: str) -> str:
    """Where a reference is to be read: of arXiv, of a DOI, or an address."""
    kind, _, number = reference.partition(":")
    return {"arXiv": f"https://arxiv.org/abs/{number}", "doi": f"https://doi.org/{number}"}.get(kind, reference)


def renewed(page: str, spec: MethodSpec) -> str:
    """The page with its generated part as it is now. Raises ValueError where the markers are not there once each."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"docs/methods/{spec.name}.md: put {BEGIN} and {END} into it, once each")
    before, rest = page.split(BEGIN)
    return before + block(spec) + rest.split(END)[1]


def stale(folder: Path) -> dict[Path, str]:
    """The pages that are missing or not current, with what they should be."""
    pages = {}
    for spec in list_methods():
        path = folder / f"{spec.name}.md"
        old = path.read_text(encoding="utf-8") if path.exists() else f"# {spec.name}\n\n{BEGIN}\n{END}\n"
        new = renewed(old, spec)
        if new != old or not path.exists():
            pages[path] = new
    return pages


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page is not current")
    args = parser.parse_args()
    pages = stale(FOLDER)
    for path, content in pages.items():
        print(f"{path.relative_to(FOLDER.parent.parent)} is {'not current' if args.check else 'written'}")
        if not args.check:
            path.write_text(content, encoding="utf-8")
    return int(args.check and bool(pages))


if __name__ == "__main__":
    sys.exit(main())

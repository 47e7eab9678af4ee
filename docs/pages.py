"""Pages of the site that are made from the code: one per method, the Python API, and the README.

mkdocs calls this file (`mkdocs.yml`, plugin gen-files); `pages()` alone needs no mkdocs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from gallery import MADE, REPORTS  # noqa: E402

import fedkd  # noqa: E402
from tests.tables import REGISTRIES, cells, rows  # noqa: E402

# Sections of the written pages whose names get a page each: folder of the site, written page,
# package of the code.
FAMILIES = {
    "Losses": ("losses", "losses.md"),
    "Fusion rules": ("fusion", "methods.md"),
    "Releases": ("releases", "methods.md"),
    "Codecs": ("codecs", "methods.md"),
    "Baselines": ("baselines", "methods.md"),
    "Models": ("models", "methods.md"),
    "Data sets": ("datasets", "methods.md"),
    "Partitions": ("partitions", "methods.md"),
    "Properties": ("properties", "methods.md"),
}
KEYS = {
    "Losses": "distillation:\n  losses:\n    - name: {name}",
    "Fusion rules": "fusion:\n  - name: {name}",
    "Releases": "release:\n  name: {name}",
    "Codecs": "federation:\n  codec:\n    name: {name}",
    "Models": "student:\n  model:\n    name: {name}",
    "Data sets": "data:\n  dataset:\n    name: {name}",
    "Partitions": "data:\n  partition:\n    name: {name}",
}
MEASURED = ("compare.md", "distill.md", "attacks.md", "privacy.md")
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#]+)(#[^)]*)?\)")
LIFTED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def pages() -> dict[str, str]:
    """Path below the site's root -> Markdown, of all pages that nobody writes by hand."""
    made = {target: lifted(source) for source, target in LIFTED.items()}
    made |= {file.name: inside(file) for file in sorted((ROOT / "docs").glob("*.md"))}
    for section, (folder, written) in FAMILIES.items():
        names = REGISTRIES[section].names()
        made |= {f"methods/{folder}/{name}.md": method(section, name, written) for name in names}
        made[f"methods/{folder}/index.md"] = index(section, folder, written)
    made["reference.md"] = reference()
    made["gallery.md"] = gallery()
    return made


def navigation() -> str:
    """The part of the navigation that lists the methods, as literate-nav reads it."""
    lines = []
    for section, (folder, _) in FAMILIES.items():
        lines.append(f"* [{section}]({folder}/index.md)")
        lines += [f"    * [{n}]({folder}/{n}.md)" for n in REGISTRIES[section].names()]
    return "\n".join(lines) + "\n"


def method(section: str, name: str, written: str) -> str:
    """The page of one method: what it is and needs, how to use it, what it gave, its code."""
    registry = REGISTRIES[section]
    text = (ROOT / "docs" / written).read_text(encoding="utf-8")
    row = rows(text, section).get(name, [f"`{name}`", registry.summary(name)])
    row = [up(cell, written) for cell in row]
    titles = _titles(text, section)
    facts = [f"- **{t}**: {c}" for t, c in zip(titles[2:], row[2:]) if t != "options"]
    parts = [f"# {name}", row[1], "\n".join(facts)]
    if section in KEYS:
        parts += ["## In a config", f"```yaml\n{_example(section, name)}\n```"]
    if found := _section(text, name):
        parts += ["## Use", up(found, written)]
    if measured := list(_measured(name)):
        parts += ["## Measured", *measured]
    parts += ["## Code", _code(section, name)]
    return "\n\n".join(parts) + "\n"


def _code(section: str, name: str) -> str:
    """The module of a method; of a module that has several, the method alone."""
    registry = REGISTRIES[section]
    member = registry.get(name)
    alone = [registry.get(other).__module__ for other in registry.names()].count(member.__module__)
    if alone == 1:
        return f"::: {member.__module__}"
    if not hasattr(sys.modules[member.__module__], member.__qualname__):  # made for a whole family
        return f"Made by `{member.__module__}`."
    return f"::: {member.__module__}.{member.__qualname__}"


def index(section: str, folder: str, written: str) -> str:
    """The list of a family, a line each."""
    registry = REGISTRIES[section]
    anchor = section.lower().replace(" ", "-")
    lines = [f"- [`{n}`]({n}.md): {registry.summary(n)}" for n in registry.names()]
    more = f"More about all of them: [{section}](../../{written}#{anchor})."
    return f"# {section}\n\n{more}\n\n" + "\n".join(lines) + "\n"


def reference() -> str:
    """What `import fedkd` offers, with the docstrings."""
    parts = ["# Reference", "What `import fedkd` offers; [Python API](api.md) shows it at work."]
    for name, module in sorted(fedkd._PUBLIC.items(), key=lambda item: item[0].lower()):
        parts += [f"## {name}", f"::: fedkd.{module}.{name}\n    options:\n      heading_level: 3"]
    return "\n\n".join(parts) + "\n"


def lifted(name: str) -> str:
    """A page of the repository's top folder, as a page of the site."""
    text = (ROOT / name).read_text(encoding="utf-8")

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        if target.startswith("docs/"):
            return f"[{words}]({target[5:]}{anchor})"
        return f"[{words}]({LIFTED[target]}{anchor})" if target in LIFTED else words

    return OUTSIDE.sub(link, text)


def inside(file: Path) -> str:
    """A page of `docs/`, whose links to files of the repository become words."""

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        if not target.startswith("../"):
            return found[0]
        return f"[{words}]({LIFTED[target[3:]]}{anchor})" if target[3:] in LIFTED else words

    return OUTSIDE.sub(link, file.read_text(encoding="utf-8"))


def up(text: str, page: str) -> str:
    """Links of a text of a written page that moves two folders down."""
    text = re.sub(r"\]\((#[^)]*)\)", rf"](../../{page}\1)", text)
    return OUTSIDE.sub(
        lambda m: m[0] if m[2].startswith("../../") else f"[{m[1]}](../../{m[2]}{m[3] or ''})", text
    )


def _titles(text: str, section: str) -> list[str]:
    found = re.search(rf"^##? {section}\n(?:(?!^#).*\n)*?(\| name \|.*)\n", text, re.M)
    return cells(found[1]) if found else []


def _section(text: str, name: str) -> str:
    """What is written below the heading of a name, its headings two levels down."""
    found = re.search(rf"^### `{re.escape(name)}`.*\n((?:(?!^###? ).*\n)*)", text, re.M)
    return found[1].strip() if found else ""


def _example(section: str, name: str) -> str:
    """The key that names it, with its options at their defaults."""
    head = KEYS[section].format(name=name)
    indent = "\n" + " " * (head.splitlines()[-1].index("name:"))
    return indent.join([head, *REGISTRIES[section].example(name)[1:]])


def gallery() -> str:
    """The page that lists reports, and leads to those that are there."""
    lines = [
        "# Gallery",
        "Reports as the commands write them: one file each, with its pictures and data inside.",
        "| report | what there is to see | command |\n|---|---|---|",
    ]
    for name, report in REPORTS.items():
        there = (MADE / f"{name}.html").is_file()
        title = f"[{report.title}](gallery/{name}.html)" if there else report.title
        lines[-1] += f"\n| {title} | {report.about} | `fedkd {report.command}` |"
    return "\n\n".join(lines) + "\n"


def _measured(name: str) -> Iterator[str]:
    """The rows of the measured tables that are about a method, below their headings."""
    for page in MEASURED:
        heading, title = "", ""
        text = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
        about = text[0].lstrip("# ")
        for line, after in zip(text, [*text[1:], ""]):
            if line.startswith("#"):
                heading = line.lstrip("# ")
            elif line.startswith("|") and after.startswith("|---"):
                title = line
            elif line.startswith("|") and cells(line)[0].strip("`* ") == name and title:
                rule = "|" + "---|" * len(cells(title))
                anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                where = f"{about}, [{heading}](../../{page}#{anchor}):"
                yield f"{where}\n\n{title}\n{rule}\n{up(line, page)}"


def write() -> None:
    """Hand the pages to mkdocs."""
    import mkdocs_gen_files

    for path, text in {**pages(), "methods/SUMMARY.md": navigation()}.items():
        with mkdocs_gen_files.open(path, "w") as file:
            file.write(text)
    for report in MADE.glob("*.html"):
        with mkdocs_gen_files.open(f"gallery/{report.name}", "w") as file:
            file.write(report.read_text(encoding="utf-8"))


if __name__ == "<run_path>":  # by mkdocs
    write()

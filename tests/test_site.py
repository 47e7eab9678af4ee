"""The site's generated pages: one per method, and links that lead somewhere."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#]+)")


@pytest.fixture(scope="module")
def site() -> dict[str, Any]:
    """The names that `docs/pages.py` defines, and the pages that it makes."""
    names = runpy.run_path(str(ROOT / "docs" / "pages.py"), run_name="pages")
    return {**names, "made": names["pages"]()}


def test_every_method_has_a_page_with_its_summary_and_code(site: dict[str, Any]) -> None:
    for section, (folder, _) in site["FAMILIES"].items():
        registry = site["REGISTRIES"][section]
        for name in registry.names():
            page = site["made"][f"methods/{folder}/{name}.md"]
            assert page.startswith(f"# {name}\n")
            assert registry.get(name).__module__ in page
            assert f"[`{name}`]({name}.md)" in site["made"][f"methods/{folder}/index.md"]
            assert f"[{name}]({folder}/{name}.md)" in site["navigation"]()


def test_a_page_of_a_loss_holds_its_row_config_text_and_numbers(site: dict[str, Any]) -> None:
    page = site["made"]["methods/losses/dkd.md"]
    config = "    - name: dkd\n      alpha: 1.0"
    for words in ("**labels**: yes", "**bytes per transfer sample**: 2C", config,
                  "## Use", "## Measured", "::: fedkd.losses.dkd"):  # fmt: skip
        assert words in page


def test_links_lead_to_pages(site: dict[str, Any]) -> None:
    made: dict[str, str] = site["made"]
    files = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.*")}
    for path, text in made.items():
        for target in LINK.findall(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
            if target.startswith("gallery/"):  # made by docs/gallery.py, where somebody ran it
                continue
            place = (ROOT / "docs" / path).parent / target
            found = Path(*place.parts).resolve().relative_to((ROOT / "docs").resolve()).as_posix()
            assert found in made or found in files, f"{path}: {target}"


def test_the_gallery_lists_commands_whose_configs_are_there(site: dict[str, Any]) -> None:
    configs = re.findall(r"configs/\S+\.yaml", site["made"]["gallery.md"])
    assert len(configs) >= 5
    assert all((ROOT / config).is_file() for config in configs)

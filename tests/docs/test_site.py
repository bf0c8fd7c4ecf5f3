"""Manual and README: the site builds without warnings and loads nothing from the network; links exist."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


def test_site_builds_and_loads_nothing_from_the_network(tmp_path, monkeypatch):
    config = pytest.importorskip("mkdocs.config", reason="needs requirements/docs.txt")
    from mkdocs.commands.build import build

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(config.load_config(str(REPO / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert len(pages) == len(list(REPO.glob("docs/*.md"))) + 1  # and 404.html
    for path, page in pages.items():
        loaded = re.findall(r'<(?:script|img|link)[^>]*?(?:src|href)="([^"]+)"', page)
        assert loaded and not [url for url in loaded if re.match(r"(https?:)?//", url)], path
    assert (tmp_path / "results" / "time_to_loss_cpu.png").is_file()


def test_links_of_the_readme_exist():
    text = (REPO / "README.md").read_text(encoding="ascii")
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]+)(#([\w-]+))?\)", text):
        assert (REPO / target).is_file(), target
        headings = re.findall(r"^#+ (.*)$", (REPO / target).read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, f"{target}#{anchor}"


def test_readme_is_short():
    assert len((REPO / "README.md").read_text(encoding="ascii").splitlines()) <= 230

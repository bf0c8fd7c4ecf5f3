"""Let pages of the manual show files of results/, which lies outside of docs/.

Pages link to ``../results/NAME``, which works where the repository is browsed. In the site, the file is copied to
``results/NAME``.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the images of results/ to the site."""
    root = Path(config.config_file_path).parent
    for image in sorted(root.glob("results/*.png")):
        files.append(File.generated(config, image.relative_to(root).as_posix(), abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links to results/ at the copies."""
    return markdown.replace("](../results/", "](results/")

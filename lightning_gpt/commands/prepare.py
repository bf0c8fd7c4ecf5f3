"""Turn text into token files, or extract a model's token embeddings: ``python prepare.py --help``."""

import sys
from collections.abc import Sequence

from lightning_gpt.cli import parse_embeddings, parse_prepare, reporting_errors


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, write token files or embeddings, and print what was written."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["embeddings"]:
        embeddings = parse_embeddings(words[1:])
        from lightning_gpt.checkpoint.embeddings import extract_embeddings

        print(extract_embeddings(embeddings))
        return
    options = parse_prepare(words)
    from lightning_gpt.data.tokens.preparation import prepare_folder  # imports torch, which --help must not

    print(prepare_folder(options))

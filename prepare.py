"""Turns text into token files: ``python prepare.py --help``; and takes a model's token embeddings out."""

import sys
from collections.abc import Sequence

from lightning_gpt.cli import parse_embeddings, parse_prepare, reporting_errors


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, writes the token files or the embeddings, and prints what was written."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["embeddings"]:
        embeddings = parse_embeddings(words[1:])
        from lightning_gpt.checkpoint.embeddings import extract_embeddings

        print(extract_embeddings(embeddings))
        return
    options = parse_prepare(words)
    from lightning_gpt.data.tokens.preparation import (
        prepare_folder,  # after parsing, so that --help need not wait for torch
    )

    print(prepare_folder(options))


if __name__ == "__main__":
    main()

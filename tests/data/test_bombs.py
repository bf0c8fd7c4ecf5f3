"""Text files that unpack to far more than their size: one line, before memory is taken."""

import gzip
import json
from pathlib import Path

import pytest

import prepare
from lightning_gpt.data.text import documents, parquet_pages

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write_parquet(file: Path, texts: list[str], **options) -> None:
    parquet.write_table(pyarrow.table({"text": texts}), file, **options)


def repeated(file: Path) -> None:
    """Write rows that are one text of 1 MB, of which the file's dictionary holds one copy."""
    write_parquet(file, ["x" * 1_000_000] * 30, compression="zstd")


def one_cell(file: Path) -> None:
    write_parquet(file, ["x" * (2 << 20)], compression="zstd", use_dictionary=False)


def prefixes(file: Path) -> None:
    """Write rows that repeat the row before, of which DELTA_BYTE_ARRAY stores only that."""
    encoding = {"text": "DELTA_BYTE_ARRAY"}
    write_parquet(file, ["x" * 20_000] * 1500, use_dictionary=False, column_encoding=encoding, compression="none")


def zeros(file: Path) -> None:
    file.write_bytes(gzip.compress(bytes(20 << 20)))


def zeros_zst(file: Path) -> None:
    with pyarrow.CompressedOutputStream(str(file), "zstd") as out:
        out.write(bytes(20 << 20))


def long_line(file: Path) -> None:
    file.write_bytes(gzip.compress(b'{"text": "' + b"x" * (40 << 20) + b'"}', 1))


CASES = {
    "repeated.parquet": (repeated, "200 times"),
    "cell.parquet": (one_cell, "page of 2 MiB"),
    "prefixes.parquet": (prefixes, "200 times"),
    "zeros.txt.gz": (zeros, "200 times"),
    "zeros.txt.zst": (zeros_zst, "200 times"),
    "line.jsonl.gz": (long_line, "line 1"),
}


@pytest.mark.parametrize("name", CASES)
def test_text_that_unpacks_to_too_much_is_refused(name, tmp_path, refused, monkeypatch):
    write, mentions = CASES[name]
    monkeypatch.setattr(documents, "MAX_PAGE_BYTES", 3 << 19)
    write(tmp_path / name)
    refused(prepare.main, tmp_path / name, "--tokenizer=byte", f"--out={tmp_path / 'out'}", mentions=[name, mentions])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"compression": "none"}]
)
def test_page_sizes_are_those_of_all_pages(options, tmp_path):
    texts = [f"{i} {'the cat ' * 50}" for i in range(5000)]
    write_parquet(tmp_path / "a.parquet", texts, data_page_size=10_000, row_group_size=2000, **options)
    total = 0
    with parquet.ParquetFile(tmp_path / "a.parquet") as file, (tmp_path / "a.parquet").open("rb") as raw:
        for i in range(file.num_row_groups):
            column = file.metadata.row_group(i).column(0)
            sizes = list(parquet_pages.page_sizes(raw, column))
            assert sizes
            # The footer counts the headers of pages as well, which quote the least and the greatest text.
            assert sum(sizes) < column.total_uncompressed_size < sum(sizes) + 1000 * len(sizes)
            total += sum(sizes)
    assert total > 0
    blocks = documents.FileDocuments((tmp_path / "a.parquet",)).blocks()
    assert [block.data.decode() for block in blocks] == texts


def test_longest_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_ROW_BYTES", 1 << 20)
    texts = ["x" * (1 << 20), "ab" * 19, "y" * (1 << 20)]
    write_parquet(tmp_path / "a.parquet", texts)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text[:-20]}) for text in texts))
    for file, ends in (("a.parquet", 0), ("a.jsonl", 20)):
        blocks = documents.FileDocuments((tmp_path / file,)).blocks()
        assert [block.data.decode() for block in blocks] == [text[: len(text) - ends] for text in texts]

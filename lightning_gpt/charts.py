"""Write charts as PNG or SVG files; matplotlib is imported when one is drawn."""

import importlib.util
from io import BytesIO
from pathlib import Path
from typing import Any

from lightning_gpt.atomic import atomic_file, require_writable
from lightning_gpt.config import UserError
from lightning_gpt.invocation import install_line

FORMATS = (".png", ".svg")


def require_matplotlib(*, flag: str) -> None:
    """Raise a UserError that names the flag if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--{flag}: needs matplotlib; {install_line('bench')}")


def require_chart(file: str, *, flag: str = "plot") -> None:
    """Check that a chart can be drawn into a file, before anything is measured.

    Args:
        file: Path of the file.
        flag: Name of the flag that it came from.

    Raises:
        UserError: matplotlib is not installed, the ending is unknown, or the file cannot be written.
    """
    require_matplotlib(flag=flag)
    if Path(file).suffix.lower() not in FORMATS:
        raise UserError(f"--{flag} {file}: not a format for charts; give a file that ends in {' or '.join(FORMATS)}")
    require_writable(file, flag=flag)


def picture(figure: Any, *, form: str) -> bytes:
    """Return a matplotlib figure as the content of a file.

    Args:
        figure: The figure.
        form: ".png" or ".svg". Text in an SVG stays text, so that it can be searched and the file is small.
    """
    import matplotlib

    drawn = BytesIO()
    if form == ".svg":
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning-gpt"}):
            figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        return drawn.getvalue()
    from PIL import Image

    figure.savefig(drawn, format="png")
    small = BytesIO()
    # A palette cuts the file size to a third.
    Image.open(drawn).convert("RGB").quantize(128, method=Image.Quantize.FASTOCTREE).save(small, format="PNG")
    return small.getvalue()


def save_chart(figure: Any, file: Path, *, flag: str = "plot") -> None:
    """Write a matplotlib figure to a PNG or SVG file, as its ending says.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        with atomic_file(file) as out:
            out.write(picture(figure, form=file.suffix.lower()))
    except OSError as error:  # for example, a full disk
        raise UserError(f"--{flag} {file} cannot be written: {error.strerror}; choose another") from error

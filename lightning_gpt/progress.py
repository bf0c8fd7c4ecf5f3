"""Show progress on stderr: a bar in a terminal, elsewhere a line every 30 seconds."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30
PATIENCE = 2.0  # seconds for which a command may be silent
_BAR_SECONDS = 0.2  # between two refreshes


class Progress:
    """Progress towards a total, with the time left.

    The time left follows from the mean pace since the first update, because what comes before it (compilation, the
    first read of a file) happens once.

    Args:
        what: What is done, in a word or two.
        total: The number that ends it.
        done: The number at the start.
        unit: Unit of the numbers, in the plural.
        delay: Seconds before anything is shown.
        keep: Whether the bar stays on the screen at the end.
    """

    def __init__(
        self, what: str, *, total: int, done: int = 0, unit: str = "", delay: float = 0.0, keep: bool = False
    ) -> None:
        self.what = what
        self.total = total
        self.done = done
        self.unit = f" {unit}" if unit else ""
        self.keep = keep
        self._first: tuple[int, float] | None = None
        self._bar: tqdm | None = None
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown = time.monotonic() + delay
        if self._is_terminal and not delay:
            self._refresh("")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def update(self, done: int, note: str = "", *, last: bool = False) -> None:
        """Report the progress.

        Args:
            done: The number that is reached.
            note: Text behind it.
            last: Whether to show it even if the last refresh was a moment ago.
        """
        self.done = done
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
        if self._is_terminal:
            if last or now - self._shown >= _BAR_SECONDS:
                self._shown = now
                self._refresh(note)
        elif now - self._shown >= LINE_SECONDS:
            self._shown = now
            print(f"{self.what}: {self._text(note)}", file=sys.stderr, flush=True)

    def write(self, text: str, **kwargs: Any) -> None:
        """Print a line on stdout, above the bar."""
        if self._bar is None:
            print(text, **kwargs)
        else:
            tqdm.write(text, file=sys.stdout, **kwargs)

    def close(self) -> None:
        """End the bar, so that messages begin on a line of their own."""
        if self._bar is not None:
            self._bar.close()

    def _refresh(self, note: str) -> None:
        if self._bar is None:
            self._bar = tqdm(total=self.total, file=sys.stderr, dynamic_ncols=True, leave=self.keep, bar_format="{bar}")
        text = self._text(note).replace("{", "{{").replace("}", "}}")
        self._bar.bar_format = f"{self.what} {{percentage:3.0f}}%|{{bar}}| {text}"
        self._bar.n = self.done
        self._bar.refresh()

    def _text(self, note: str) -> str:
        """Return the numbers, the note and the time left, separated by commas."""
        parts = [f"{self.done:,}/{self.total:,}{self.unit}", note]
        if self._first is not None and self.done > self._first[0] and self.done < self.total:
            pace = (time.monotonic() - self._first[1]) / (self.done - self._first[0])
            parts.append(f"{tqdm.format_interval(pace * (self.total - self.done))} left")
        return ", ".join(part for part in parts if part)

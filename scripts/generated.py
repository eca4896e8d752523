"""A part of a page that a script writes, between two marks."""

import sys
from pathlib import Path


def rewrite(page: Path, begin: str, end: str, content: str, source: str) -> None:
    """Writes the content between the marks; with ``--check`` exits with 1 if it differs from what stands there."""
    text = page.read_text(encoding="utf-8")
    head, _, tail = text.partition(begin)
    _, _, foot = tail.partition(end)
    rewritten = f"{head}{begin}{content}{end}{foot}"
    if "--check" not in sys.argv[1:]:
        page.write_text(rewritten, encoding="utf-8")
    elif rewritten != text:
        sys.exit(f"{page} differs from {source}; run python scripts/{Path(sys.argv[0]).name}")

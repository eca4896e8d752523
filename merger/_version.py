"""The version, where everything can read it without importing anything."""

VERSION = "0.2.0"

MARK = "written by merger"
"""What a file says of itself whose name does not tell who wrote it, so that a later run may replace it."""

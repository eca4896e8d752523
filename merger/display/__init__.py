"""Tables and pages as data, and the one place that shows them: on a terminal of any width, or in a browser.

Knows no models and no statistics.
"""

from merger.display.table import Cell, Column, Row, Table, text_row

__all__ = ["Cell", "Column", "Row", "Table", "text_row"]

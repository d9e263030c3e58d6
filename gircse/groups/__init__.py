"""Texts in groups: `classify` sorts them into classes that are named or shown, `clusters` finds groups and names them.

This file holds only the words they share, so that the command line can offer them without importing anything heavy.
"""

from __future__ import annotations

DEFAULT_INSTRUCTION = "Identify the category of the text"
"""What vectors are about where nobody says."""

DEFAULT_CLUSTERS = 8
"""k of k-means."""

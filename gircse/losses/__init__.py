"""What training minimises: `ICRLoss`, the same for large batches, and answers that soft tokens shall spell.

Knows embeddings after every step; knows nothing of data files or trainers.
"""

from __future__ import annotations

from gircse.losses.cached import CachedICRLoss
from gircse.losses.icr import ICRLoss

__all__ = ["CachedICRLoss", "ICRLoss"]

"""Where weights come from: a folder, the hub, or a Python package, GGUF files among them.

`resolve` finds and checks them, `packaged_files` fetches packages, `gguf` converts. Knows nothing of refinement.
"""

from __future__ import annotations

from gircse.backbones.resolve import cache_home, cached_backbones, known_backbones, resolve_backbone

__all__ = ["cache_home", "cached_backbones", "known_backbones", "resolve_backbone"]

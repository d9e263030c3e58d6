"""Corpus embedding: a file of texts in, a file of vectors out, in bounded memory and safe against being killed.

`reader` streams rows in, `writer` keeps finished shards and merges them, `job` ties the two to a model. This file holds
only the words they share, so that the command line can offer them without importing anything heavy.
"""

from __future__ import annotations

from typing import Literal

InputFormat = Literal["txt", "jsonl", "csv", "parquet"]
"""How a corpus is stored."""

Precision = Literal["float32", "float16", "int8", "binary"]
"""How a vector's values are stored; `gircse.embed.job.store_as` says how each is computed."""

DEFAULT_SHARD_SIZE = 1024
"""Rows of one shard."""

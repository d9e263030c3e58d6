"""How many compiled kernels PyTorch keeps for its products on a CPU. It imports no torch: it comes before all else.

oneDNN compiles a kernel for every number of rows that a product meets, and two caches keep 1,024 each. Batches of texts
have some other number of rows every time: in bfloat16 they come to hold half a gigabyte (docs/experiments.md).
"""

from __future__ import annotations

import os

from gircse.errors import UsageError

KERNELS = 32
"""A pass over prompts needs four, a batch has some four of them, and its soft tokens need six more; what was forgotten
takes a millisecond to compile."""

VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""What ideep, PyTorch's own layer over oneDNN, reads, and oneDNN itself."""


def limit_kernel_caches() -> None:
    """Let this process and its children keep `KERNELS` of them; a limit that the environment sets already stays.

    It is a matter of the whole process, so programs call it and not models; before the first product.

    Raises:
        UsageError: ideep's limit is no number above 0, at which the first product would end the process.
    """
    for name in VARIABLES:
        os.environ.setdefault(name, str(KERNELS))
    limit = os.environ[VARIABLES[0]]
    if not (limit.isdecimal() and int(limit) > 0):
        raise UsageError(f"{VARIABLES[0]}={limit!r} crashes PyTorch; set it to a whole number above 0, or not at all")

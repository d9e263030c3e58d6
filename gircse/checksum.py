"""What makes two models' vectors comparable, as a checksum. Knows an encoder's weights; knows nothing of files."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING

import torch

from gircse.adapter import is_of_adapter

if TYPE_CHECKING:
    from gircse.encoder import GenerativeEncoder


def vectors_checksum(encoder: GenerativeEncoder) -> str:
    """SHA-256 of what vectors depend on: the backbone's checksum, the trained weights, pooling and temperature.

    The same whether the weights are loaded as float32 or bfloat16, or have been quantised or packed since: such
    vectors may be mixed.
    """
    if encoder.checksum_before_freezing is not None:
        return encoder.checksum_before_freezing
    refinement, weights = encoder.refinement, encoder.weights
    facts = [encoder.reference.sha256, weights, refinement.pooling, refinement.temperature]
    if refinement.attention != "causal":  # which older indexes do not say
        facts.append(refinement.attention)
    digest = sha256(json.dumps(facts).encode())
    for name, parameter in sorted(encoder.backbone.named_parameters()):
        if weights == "full" or (weights == "adapter" and is_of_adapter(name)):
            rounded = parameter.detach().to("cpu", torch.bfloat16).contiguous().view(-1).view(torch.uint8)
            digest.update(name.encode() + rounded.numpy().tobytes())
    return digest.hexdigest()

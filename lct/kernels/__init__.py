"""One public function per operation. `reference.py` is the specification of each."""

from lct.kernels.attention import attention
from lct.kernels.cache import KVRows, assemble_, norm_rope_append_
from lct.kernels.modulate import gated, modulate
from lct.kernels.norm_rope import NormRope, norm_rope_join

__all__ = ["KVRows", "NormRope", "assemble_", "attention", "gated", "modulate", "norm_rope_append_", "norm_rope_join"]

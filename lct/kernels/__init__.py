"""One public function per operation. `reference.py` is the specification of each."""

from lct.kernels.attention import attention
from lct.kernels.norm_rope import NormRope, norm_rope_append_, norm_rope_join

__all__ = ["NormRope", "attention", "norm_rope_append_", "norm_rope_join"]

"""What Triton kernels share that walk up trees of drafts; see `tree`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def parent_of(node, parents, parents_token):
    """What comes before a node: a token's parent, or before -1 the inputs -2, -3 and so on.

    ``parents`` points to the first token's, which may hold anything. What would not come before its token is replaced:
    walks must end, and read nothing where there is no token.
    """
    parent = tl.load(parents + node * parents_token, node >= 0, -1).to(tl.int64)
    return tl.minimum(tl.maximum(parent, -1), node - 1)

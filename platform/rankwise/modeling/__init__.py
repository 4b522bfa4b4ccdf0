"""The quantized base, its fingerprint and cache, adapters on disk, estimates, merging."""

import os

# Passes of many lengths fragment CUDA's allocator: segments that grow lose much less. It is read when the allocator
# starts. Whoever sets either variable decides.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# First, since it imports bitsandbytes in its own way.
import rankwise.compat.bitsandbytes  # noqa: F401

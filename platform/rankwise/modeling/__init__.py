"""The quantized base, its fingerprint and cache, adapters on disk, estimates, merging."""

# First, since it imports bitsandbytes in its own way.
import rankwise.compat.bitsandbytes  # noqa: F401

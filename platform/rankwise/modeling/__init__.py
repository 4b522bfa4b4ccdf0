"""The quantized base, its fingerprint, adapters over it, their anatomy."""

# First, since it imports bitsandbytes in its own way.
import rankwise.compat.bitsandbytes  # noqa: F401

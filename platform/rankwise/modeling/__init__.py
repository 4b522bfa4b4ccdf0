"""The quantized base, its fingerprint, adapters over it, their anatomy."""

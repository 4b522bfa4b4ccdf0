"""The quantized base, its fingerprint, adapters over it, their anatomy."""

import logging

# On CPUs with AVX512-BF16, bitsandbytes says at its import that a kernel from the hub is missing, which no base of
# rankwise would use; see `exact_layers`.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

"""LoRA of several adapters in one forward of the base: layers, gradients, random numbers, memory."""

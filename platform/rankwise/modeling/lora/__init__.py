"""LoRA of several adapters in one forward pass of the base: layers, gradients, random numbers, memory."""

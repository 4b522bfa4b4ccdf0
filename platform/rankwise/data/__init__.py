"""Table rows to supervised tokens: chat template, loss mask, token cache, sampler, collator, preflight checks."""

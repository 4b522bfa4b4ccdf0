"""Rows to supervised tokens: chat template, loss mask, cache, sampler, collator, preflight."""

"""YAML to a checked definition, to arms with spec hashes, to a plan. No torch, no network."""

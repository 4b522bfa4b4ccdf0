"""Private and undocumented names of mlflow, peft, transformers, bitsandbytes and torch, one module per library.

No other module uses such a name; `tests/unit/compat/test_private_names.py` checks that. Each entry says why no public
API serves and which versions it was checked with. Its test in `tests/unit/compat/` runs the library itself, so it is
the first to fail when an upgrade changes what rankwise relies on.
"""

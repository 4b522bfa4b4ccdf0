"""What a process pays for importing the package."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
import torch
compile = torch.compile
import rankwise.modeling
assert torch.compile is compile
assert "bitsandbytes" in sys.modules
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_torchs_compiler_is_not_imported():
    # The interpreter itself: what stands for it in tests has imported the libraries before.
    python = str(Path(sys.prefix, "bin", "python"))
    done = subprocess.run([python, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""What the fork server of `launch` imports, so that the ranks find it: this is for it alone."""

import atexit
import contextlib
import importlib
import os

# Torch and all that a rank is made of, and what torch's optimizers import when the first is made.
for _name in ("adaptis.execute.train", "torch._dynamo"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

# The ranks of a supervisor that died end with the server: it does not clean up for a second before.
atexit.register(os._exit, 0)

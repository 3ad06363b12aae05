"""What the fork server of `launch` imports, so that the ranks find it: this is for it alone."""

import atexit
import contextlib
import os

import adaptis.execute.train  # noqa: F401 - torch, and all that a rank is made of

with contextlib.suppress(ImportError):
    import torch._dynamo  # noqa: F401 - which torch's optimizers import when the first is made

# The ranks of a supervisor that died end with the server: it does not clean up for a second before.
atexit.register(os._exit, 0)

"""What `executor.py` and `fidelity.py` share: models that run, layers that sleep, the figure."""

"""Stages together: processes, transfers and the one loop that runs any checked program (torch)."""

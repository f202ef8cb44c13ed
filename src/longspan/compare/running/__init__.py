"""Execution of a run: one worker process after another, a cell in each."""

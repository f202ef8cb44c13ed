"""How a run is carried out: one worker process after another, a cell in each, and what the terminal shows meanwhile."""

"""The plan of a run: the request as cells, with keys and a forecast."""

"""What a run will measure: the request, checked against the model, as cells with their keys and a forecast."""

"""Reading with a model: chat templates, prefill in chunks, forced and greedy decoding."""

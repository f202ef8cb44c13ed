"""Everything that knows transformers' insides."""

"""The report of a run: advice in a sentence, a table, figures, and the protocol, in the terminal, as JSON and as a page."""

"""The report of a run, in the terminal, as JSON and as a page.

It has the advice in a sentence, a table, figures, and the protocol.
"""

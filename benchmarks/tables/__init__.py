"""Tables of README and the documentation: one function for each, which returns Markdown."""

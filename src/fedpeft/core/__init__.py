"""The types of a federation and the loop that runs it: no model, no file, no network."""

"""Pictures of timelines, one renderer a file: each takes `Timeline`s and returns text.

`text` draws for terminals and docstrings, `svg` for documents, `html` for exploring, `chrome` for
ui.perfetto.dev. None of them knows how the times came about, and none needs more than numpy.
"""

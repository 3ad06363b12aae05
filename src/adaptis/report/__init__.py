"""Pictures of timelines, one renderer a file: each takes `Timeline`s and returns text or bytes.

`text` draws for terminals and docstrings, `svg` and `png` paint the shapes of `scene` for
documents, `html` is for exploring, `chrome` for ui.perfetto.dev. None of them knows how the times
came about.
"""

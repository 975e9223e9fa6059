"""An attention backend as somebody else would ship it: outside this project, planned lazily, checked by its kit."""

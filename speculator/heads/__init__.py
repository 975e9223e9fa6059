"""Draft heads: what they ask of the target, one forward each, and every published layout of their files."""

"""Attention backends: what a pass prepares (`plan`) and what runs inside it (`run`)."""

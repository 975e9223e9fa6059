"""The acceptance report for people: a page, a terminal table, plots, from the JSON file of a run."""

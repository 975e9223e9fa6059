"""One engine over several ranks: starting them, telling them each step, and ending all when one is lost."""

"""Models for other programs: each module is found by one of them, by an entry point, and imports it."""

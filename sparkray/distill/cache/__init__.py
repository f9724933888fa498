"""Answers of a teacher in one SQLite file, shared by processes."""

"""A file of prompts through a running server: journalled, resumed exactly, spread over replicas.

read (prompt_file) -> keys and journal (journal) -> requests (asker) -> the run (run)
"""

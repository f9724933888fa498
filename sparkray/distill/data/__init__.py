"""Real text that ships with Python, and its packing into sequences of equal length."""

"""The loop: which sequences a step sees, what it costs, and how it goes on after a kill."""

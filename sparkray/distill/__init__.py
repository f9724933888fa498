"""Knowledge distillation: teachers, their rows kept in a cache or a store, losses, students and the loop."""

"""The command line: one file a noun. These files parse; the packages do. Heavy imports stand inside the verbs."""

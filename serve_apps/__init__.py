"""Serve builders: each `build(args)` returns an application; the YAML beside it deploys it."""

"""Teachers of one protocol: in this process, in an engine, on another machine, behind an API."""

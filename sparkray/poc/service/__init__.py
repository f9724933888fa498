"""The network's HTTP interface over a fleet of groups, and callbacks that arrive.

`bodies` are the wire, `manager` brings the fleet to what was asked for, `routes` is the FastAPI application, `sender`
empties the outbox. Ray Serve hosts them in `sparkray.poc.deployment`.
"""

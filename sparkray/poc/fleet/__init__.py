"""Many GPU groups as one worker: what a group does, what is told to it, and who decides.

`worker` is one group's loop, `controller` decides for all of them, `ledger` holds what must survive a crash. None
of them knows Ray: `sparkray.poc.actors` makes workers remote.
"""

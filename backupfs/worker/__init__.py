"""The engine in a process of its own, for programs in which it cannot run.

Inside a service whose locks, queues and sockets were replaced (eventlet does that), threads of the
engine would hang. So one operation is one process: ``client`` starts it and talks to it over a
socket, ``serving`` runs there. Nothing but what ``frames`` describes passes between them.
"""

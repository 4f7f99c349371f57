"""The gRPC server: protocol, services, limits, health, metrics.

A request's way: `front_process`, which speaks gRPC, passes it to `front` in the
engine's own process; its bytes reach a handler of `guard`, which parses them and turns
whatever a service raises into a status; `inference` checks the request, takes a place
from `admission`, and hands it to the engine; what the engine draws comes back through
one `streams.LoopOutbox` for all requests, with one wake-up of the event loop a step.
"""

"""The pure planner: events in, plans out; no jax, no clock, no I/O."""

"""What arrives when, for which adapter and how long: for load tests and simulations."""

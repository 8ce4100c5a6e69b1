"""What tests and benchmarks share: small inputs, a local hub, and tools that damage and kill runs."""

"""Side-by-side runs against peers. Run as modules from the repository root; results go to benchmarks/results."""

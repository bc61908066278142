"""What is measured with all of it: claims, benchmarks, sweeps and examples."""

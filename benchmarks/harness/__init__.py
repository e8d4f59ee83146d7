"""Parts of the benchmarks of evaluation harnesses: tasks, samples, the suite without one."""

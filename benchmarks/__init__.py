"""Speed, measured: alternated arms in one run, CPU time, medians and spread. `python -m benchmarks NAME`."""

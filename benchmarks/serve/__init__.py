"""Parts of the server benchmarks: HTTP client, load generator, requests, servers, processes."""

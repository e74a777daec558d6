"""One accelerator, or the CPU: KV pool, page table, sampler and the worker that runs step plans in order."""

"""Distributed training on top of a built model: device mesh, FSDP2, activation checkpointing.

`mesh.py` starts torch.distributed under torchrun and builds the device mesh; `fsdp.py` shards the
weights (FSDP2/HSDP); `activation_checkpointing.py` recomputes blocks in the backward;
`all_to_all.py` applies a function to full matrices of which every rank holds some rows (Muon).
Only this package and the trainer use torch.distributed; a single process never starts it.
"""

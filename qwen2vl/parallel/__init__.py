"""Acts on a finished model, which never knows: meshes of processes, sharding, recomputing.

Read mesh.py for who takes part, shard.py for who keeps which weights, recompute.py for what the
backward computes twice, matrices.py for work on whole matrices when every rank has a part of each.
torch.distributed lives here and in the trainer only; one process never starts it.
"""

"""Media workers: processes of limited resources that decode images and videos for a server.

    parent: pool.py, supervisor.py, worker_process.py, remote_decoding.py
        <- socket pair: protocol.py -> worker.py

A decoder that crashes, hangs or is taken over harms its worker, which is replaced. confinement.py
limits a worker's resources and takes away network and files. Nothing here imports torch.
"""

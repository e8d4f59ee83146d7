"""What listens: sockets, the protocol of a connection with its deadlines, drain, and logs.

sockets.py         sockets that are bound before the model is loaded
http_server.py     uvicorn's server with a drain before it stops
http_protocol.py   uvicorn's HTTP/1.1 protocol with deadlines and limits
logs.py            handlers of the log, plain or JSON
"""

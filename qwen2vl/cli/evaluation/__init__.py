"""What `qwen2vl eval` is made of, beside `qwen2vl.eval`.

engine_answers   an LLM in this process answers batches
server_answers   an OpenAI-compatible server answers them, several at a time
model_identity   which model has answered, in the header of a results file
report           table and JSON object of the scores, and of a comparison
"""

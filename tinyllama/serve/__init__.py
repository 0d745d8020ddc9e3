"""A model over HTTP, in OpenAI's form, and what others don't serve: probabilities of a prompt, and taps.

engine   one thread that computes, for all who ask
guard    who may ask, how much and how slowly; what becomes of errors
app      what is answered under which path
taps     intermediate values as safetensors
server   sockets, signals, and the end
"""

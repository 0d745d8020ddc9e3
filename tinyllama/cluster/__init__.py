"""A model in many processes, on one computer or many, by Dask.

connect   the way to a cluster: one that is there, or processes of this computer
found     what a worker has: this version, the model, memory
spread    who answers which lines of a batch, and what becomes of those whose worker dies
worker    what runs on the workers then
mapper    a model as a function of many prompts, for Dask's collections, joblib and Ray
shares    which workers get which layers of a model that none of them has alone
stage     some layers on one worker, with their caches
pipeline  a Llama whose layers are stages
far       what such a Llama has in place of a backend and of caches
loading   `load`, here or on a cluster
"""

"""Values inside a model: what they are called, how they are changed, and how a text keeps them.

Every value of the forward pass has a name (`model.tap_shapes`) and goes through a tap, if there is one.

    names            our names and those of other programs; what patterns mean
    edits            values that are replaced while a model runs: `Llama.edit`
    interventions    ready-made ones: ablate, scale, patch, steer
    control_vectors  directions that steer a model, and llama.cpp's files of them
    watch            what each token of a text keeps of them
"""

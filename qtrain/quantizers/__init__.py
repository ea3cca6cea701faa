"""Which of the grid's values does each weight get? One file per algorithm.

A quantizer is a dataclass with two methods around whatever it does in between:

    prepare(model, keep_float)   swap layers in place for ones that compute on the grid
    convert(model)               swap them for layers that hold integer codes, changing no bit of the outputs

What a run asks of all of them is `qtrain.quantizer.Quantizer`. Where `trains` is true the run trains the prepared model, with the
quantizer's `fit` options and its `callbacks`.
"""

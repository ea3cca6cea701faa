from qtrain.vision import mend_torchvision

mend_torchvision()  # before anything imports Lightning or transformers
